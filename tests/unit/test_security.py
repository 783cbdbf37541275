"""Nothing from outside runs here, leaves its folder, or takes what it must not have. docs/reliability.md maps the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fvtitan.assets import tiny_wan_path
from fvtitan.components.files import open_safetensors
from fvtitan.config import load_config
from fvtitan.data.latent_cache import LatentCache, text_key
from fvtitan.data.listing import list_records
from fvtitan.data.trajectory_cache import TrajectoryCache, TrajectoryFolder, num_complete
from fvtitan.distributed.parallelize import apply_compile
from fvtitan.distributed.utils import CommConfig, close_distributed, init_distributed
from fvtitan.errors import UserError, cli, redacted
from fvtitan.generate import load_model
from fvtitan.methods import METHODS
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.wan import weights
from tests.helpers import ROOT, make_cache, random_transformer, small_arguments, train

SHARD = "shard-00000.safetensors"

# ------------------------------------------------------------------------------------------- the source tree

FORBIDDEN = {
    r"trust_remote_code(?!=False\b)": "code from a model's repository",
    r"weights_only\s*=\s*False": "a pickle that may call anything",
    r"pickle\.(load|loads|Unpickler)\b": "a pickle that may call anything",
    r"torch\.load\(": "a pickle, if of few classes",
    r"(?<![.\w])(eval|exec|compile)\(": "text as code",
    r"shell\s*=\s*True|os\.system|os\.popen": "a shell",
    r"\byaml\b|joblib|dill|cloudpickle|marshal|shelve": "formats that hold code",
    r"import_module|__import__|run_path|run_module": "a module whose name is data",
    r"allow_pickle\s*=\s*True": "a pickle in an array file",
    r"\bsubprocess\b|os\.(exec|spawn|posix_spawn)": "another program",
    r"tarfile|zipfile|unpack_archive|webdataset": "archives, whose members have paths",
    r"tempfile\.mktemp|gettempdir|[\"']/tmp": "names that others on the machine can foresee",
    r"start_debug_server|HTTPServer|socketserver": "a server",
}
ALLOWED = {
    ("fvtitan/components/checkpoint_folder.py", "class _Unpickler(pickle.Unpickler):"): "builds the records it lists",
    ("benchmarks/run.py", "importlib.import_module"): "its own table of benchmarks, by the key of a choice",
    ("fvtitan/chain.py", "subprocess"): "train.py, fvtitan.trajectories, fvtitan.score and git, by lists of words",
    ("benchmarks/ablations.py", "subprocess"): "itself, by a list of words",
    ("benchmarks/startup.py", "subprocess"): "this repository's train.py, by a list of words",
    ("fvtitan/distributed/utils.py", "gettempdir"): "a folder that must be the user's alone before it is used",
    ("benchmarks/trainer_overhead.py", "runpy.run_path(str(TRAIN)"): "this repository's train.py",
    ("fvtitan/models/wan/files.py", "weights_only=True, mmap=True)"): "tensors alone, of Self-Forcing and CausVid",
    ("fvtitan/models/wan/files.py", "zipfile"): "the error of one that torch.load cannot read",
}


def forbidden_lines() -> list[tuple[str, str, str]]:
    files = [ROOT / "train.py", *sorted((ROOT / "fvtitan").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    return [
        (path.relative_to(ROOT).as_posix(), line.strip(), why)
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        for pattern, why in FORBIDDEN.items()
        if re.search(pattern, line.split("  #")[0])
    ]


def test_the_source_has_no_way_to_run_what_it_reads():
    found = forbidden_lines()
    unexpected = [f for f in found if not any(f[0] == file and text in f[1] for file, text in ALLOWED)]
    assert unexpected == []
    used = {(file, text) for file, text in ALLOWED if any(f[0] == file and text in f[1] for f in found)}
    assert used == set(ALLOWED), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "line",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "torch.load(path)",
        "torch.load(path, weights_only = False)",
        "pickle.loads(x)",
        "value = eval(text)",
        "subprocess.run(x, shell=True)",
        "import yaml",
        "importlib.import_module(name)",
        "subprocess.Popen(words)",
        'open("/tmp/fvtitan", "w")',
        "tarfile.open(path).extractall()",
    ],
)
def test_it_would_be_noticed(line):
    assert any(re.search(pattern, line) for pattern in FORBIDDEN)


def test_harmless_lines_are_not_noticed():
    for line in (
        "encoder.eval()",
        "re.compile(x)",
        "block.compile(x)",
        "trust_remote_code=False",
        "torch.load_library",
    ):
        assert not any(re.search(pattern, line) for pattern in FORBIDDEN), line


# -------------------------------------------------------------------------------------- names in configurations


@pytest.mark.parametrize(
    "name", ["os.system", "os:system", "fvtitan.methods.kd.KDMethod", "_target_", "", "__import__('os')"]
)
def test_methods_and_models_come_from_registries_only(tmp_path, name):
    for text in (
        f'[models.student]\nflavor = "tiny"\n[method]\nname = "{name}"\n',
        f'[models.student]\nflavor = "tiny"\nname = "{name}"\n',
        f'[models.student]\nflavor = "{name or "x"}"\n',
        f'[models.student]\nflavor = "tiny"\n_target_ = "{name}"\n',
    ):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(UserError):
            load_config(["--job.config_file", str(tmp_path / "a.toml")])
    assert all(isinstance(cls, type) for cls in METHODS.values())


@pytest.mark.parametrize("key", ["wandb_api_key", "api_key", "hf_token", "password"])
def test_a_secret_has_no_place_in_a_configuration(tmp_path, key):
    for section in ("metrics", "job", "models.student"):
        (tmp_path / "a.toml").write_text(f'[{section}]\n{key} = "v3ry-s3cret"\n')
        with pytest.raises(UserError, match=f"unknown key {section}.{key}") as error:
            load_config(["--job.config_file", str(tmp_path / "a.toml")])
        assert "v3ry-s3cret" not in str(error.value)


# ----------------------------------------------------------------------------------------- safetensors' headers

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def content(header: object, data: bytes = bytes(4), size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


ENTRY = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {
    "nothing": b"",
    "huge": content({"a": F32}, size=2**63),
    "200 MB": content({"a": F32}, size=200_000_000),
    "longer than the file": content({"a": F32}, size=4096),
    "not JSON": content(b"\xff\xfe{"),
    "a list": content(b"[1]"),
    "the same bytes twice": content({"a": F32, "b": F32}),
    "overlapping": content(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 8]}}, bytes(8)
    ),
    "a hole": content({"a": {**F32, "data_offsets": [4, 8]}}, bytes(8)),
    "shape and bytes differ": content({"a": {**F32, "shape": [3]}}),
    "overflow": content({"a": {**F32, "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
    "negative": content({"a": {**F32, "shape": [-1]}}),
    "cut": content({"a": F32}, bytes(2)),
    "more than it says": content({"a": F32}, bytes(8)),
    "no such dtype": content({"a": {**F32, "dtype": "F33"}}),
}
TWICE = content(b"{" + ENTRY + b", " + ENTRY + b"}")


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_itself_refuses(tmp_path, name):
    (tmp_path / "a.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "a.safetensors", framework="pt")


def test_a_name_that_is_there_twice_is_refused_by_us(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(TWICE)
    assert list(safe_open(path, framework="pt").keys()) == ["a"]  # the last one
    with pytest.raises(SafetensorError, match="'a' is in its header twice"):
        open_safetensors(path)
    save_file({"a": torch.zeros(2), "b": torch.zeros(0)}, path, {"format": "pt"})
    assert sorted(open_safetensors(path).keys()) == ["a", "b"]


def resize(cache: Path) -> None:
    """The manifest's sizes fit again: only the header is left to see."""
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"] |= {path.name: path.stat().st_size for path in cache.glob("shard-*.safetensors")}
    (cache / "manifest.json").write_text(json.dumps(manifest))


CONTRACT = {"timesteps": [1000.0, 500.0], "shape": [1, 2, 1, 1], "dtype": "bfloat16"}


def trajectories(folder: Path) -> TrajectoryFolder:
    """A complete cache of two samples."""
    made = TrajectoryFolder(folder, CONTRACT)
    made.begin()
    for index in range(2):
        made.write_sample(index, torch.full((2, 1, 2, 1, 1), index), torch.zeros(1, 2, 1, 1))
    made.pack(SHARD, range(2))
    made.commit(2)
    return made


def read_trajectories(folder: Path) -> TrajectoryCache:
    return TrajectoryCache(
        TrajectoryFolder(folder, CONTRACT), num_complete(folder, 2), LatentCache(folder.parent / "cache"), [0, 1]
    )


def readers(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Every reader of tensors: the file to damage, and reading it."""
    make_cache(folder / "cache")
    trajectories(folder / "t")
    pipeline = shutil.copytree(tiny_wan_path(), folder / "pipeline")

    def cached() -> LatentCache:
        resize(folder / "cache")
        return LatentCache(folder / "cache")

    def regressed() -> TrajectoryCache:
        resize(folder / "t")
        return read_trajectories(folder / "t")

    return {
        "latents": (folder / "cache" / SHARD, cached),
        "prompts": (folder / "cache/prompts.safetensors", cached),
        "trajectories": (folder / "t" / SHARD, regressed),
        "transformer": (pipeline / "transformer" / weights.WEIGHTS_NAME, lambda: weights.read_pipeline(str(pipeline))),
        "text encoder": (pipeline / "text_encoder/model.safetensors", lambda: TextEncoder(str(pipeline))),
        "VAE": (pipeline / "vae" / weights.WEIGHTS_NAME, lambda: VideoVAE(str(pipeline))),
    }


def test_every_reader_names_the_file_with_a_bad_header(tmp_path):
    for kind, (path, read) in readers(tmp_path).items():
        good = path.read_bytes()
        read()
        for damage in ("huge", "a hole", "cut", "not JSON", "twice"):
            path.write_bytes(HEADERS.get(damage, TWICE))
            with pytest.raises(UserError, match="damaged|lacks|missing") as error:
                read()
            assert path.name in str(error.value) and str(path.parent) in str(error.value), (path, damage, error.value)
        path.write_bytes(good)
        path.unlink()
        if kind == "trajectories":
            assert num_complete(path.parent, 2) == 0  # they are made again
        else:
            with pytest.raises(UserError):
                read()
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {text_key("caption 4"): torch.zeros(6, 32).bfloat16()},
            r"text of sample '4.mp4' is BF16 \[6, 32\], need BF16 \[L, 64\]",
        ),
        ({text_key("caption 4"): torch.zeros(6, 64)}, r"the text of sample '4.mp4' is F32 \[6, 64\], need BF16"),
        ({text_key("caption 4"): torch.zeros(64).bfloat16()}, r"the text of sample '4.mp4' is BF16 \[64\]"),
    ],
)
def test_embeddings_have_one_width(tmp_path, change, message):
    cache = make_cache(tmp_path / "cache")
    save_file(load_file(cache / SHARD) | change, cache / SHARD)
    resize(cache)
    with pytest.raises(UserError, match=message):
        LatentCache(cache)
    save_file({"empty": torch.zeros(1, 64).bfloat16(), "negative": torch.zeros(1, 64)}, cache / "prompts.safetensors")
    with pytest.raises(UserError, match="prompts.safetensors: negative is F32"):
        LatentCache(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"000001.states": torch.zeros(3, 1, 2, 1, 1).bfloat16()},
            r"states of sample 1 is BF16 \[3, 1, 2, 1, 1\], the contract says bfloat16 \[2, 1",
        ),
        ({"000001.x0": torch.zeros(1, 2, 1, 1)}, r"x0 of sample 1 is F32"),
        ({"000001.x0": None}, "shard-00000.safetensors is damaged"),
    ],
)
def test_trajectories_are_what_their_contract_says(tmp_path, change, message):
    make_cache(tmp_path / "cache")
    trajectories(tmp_path / "t")
    assert read_trajectories(tmp_path / "t")[1]["states"].eq(1).all()
    tensors = load_file(tmp_path / "t" / SHARD) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "t" / SHARD)
    resize(tmp_path / "t")
    with pytest.raises(UserError, match=message):
        read_trajectories(tmp_path / "t")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool])
def test_weights_are_floats(tmp_path, dtype):
    """Integers, and 8-bit floats whose scales lie elsewhere, would be taken for values."""
    ours = random_transformer()
    weights.save_transformer(ours.state_dict(), ours.cfg, tmp_path)
    path = tmp_path / weights.WEIGHTS_NAME
    state = load_file(path)
    save_file(state | {"proj_out.bias": torch.ones(state["proj_out.bias"].shape).to(dtype)}, path)
    with pytest.raises(
        UserError, match=rf"{tmp_path}: 1 .* fit: proj_out.bias has dtype \w+, need one of F64, F32, F16, BF16"
    ):
        weights.read_pipeline(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- paths

OUTSIDE = ["../outside.safetensors", "sub/../../outside.safetensors", "..", "/etc/passwd", "", ".", "a/b.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_shards_stay_in_their_folder(tmp_path, name):
    cache = make_cache(tmp_path / "cache")
    shutil.copy(cache / SHARD, tmp_path / "outside.safetensors")
    shutil.copytree(cache, cache / "a")
    (cache / "sub").mkdir()
    with pytest.raises(UserError, match="leaves the folder"):
        LatentCache(cache)._files.open(name)
    trajectories(tmp_path / "t")
    manifest = json.loads((tmp_path / "t/manifest.json").read_text())
    (tmp_path / "t/manifest.json").write_text(json.dumps(manifest | {"shards": {name: 1}}))
    with pytest.raises(UserError, match="its shards leave the folder"):
        num_complete(tmp_path / "t", 2)


def test_links_out_of_a_folder_are_refused(tmp_path):
    cache = make_cache(tmp_path / "cache")
    shutil.move(cache / SHARD, tmp_path / "outside.safetensors")
    (cache / SHARD).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="leaves the folder"):
        LatentCache(cache)
    (cache / SHARD).unlink()
    shutil.move(tmp_path / "outside.safetensors", cache / "elsewhere.safetensors")
    (cache / SHARD).symlink_to("elsewhere.safetensors")  # inside
    (tmp_path / "link").symlink_to(cache)  # the folder itself may be one
    assert len(LatentCache(tmp_path / "link")) == 12
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "caption": "x"}\n')
    (data / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match="metadata.jsonl is a link that leaves the data folder"):
        list_records(data)


@pytest.mark.parametrize("name", OUTSIDE)
def test_indices_of_weights_stay_in_their_folder(tmp_path, name):
    pipeline = shutil.copytree(tiny_wan_path(), tmp_path / "pipeline")
    for part, file, read in (
        ("transformer", weights.WEIGHTS_NAME, weights.read_pipeline),
        ("text_encoder", "model.safetensors", TextEncoder),
        ("vae", weights.WEIGHTS_NAME, VideoVAE),
    ):
        whole = pipeline / part / file
        shutil.copy(whole, tmp_path / "outside.safetensors")
        (pipeline / part / "sub").mkdir()
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(whole), name)}
        whole.with_name(f"{file}.index.json").write_text(json.dumps(index))
        whole.unlink()
        with pytest.raises(UserError, match="index.json names|cannot load"):
            read(str(pipeline))


# -------------------------------------------------------------------------------------------------- remote code


def test_code_in_a_model_folder_is_never_imported(tmp_path):
    """Every place where the libraries would look for it: pipeline, model, tokenizer."""
    pipeline = shutil.copytree(tiny_wan_path(), tmp_path / "pipeline")
    sentinel = tmp_path / "executed"
    code = f"open({str(sentinel)!r}, 'a').write(__name__)\nclass Evil:\n    pass\n"
    for folder in (pipeline, *(path for path in pipeline.iterdir() if path.is_dir())):
        for name in ("evil", "pipeline", "modeling_evil", "tokenization_evil", "configuration_evil"):
            (folder / f"{name}.py").write_text(code)
    index = json.loads((pipeline / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Evil"], "transformer": ["evil", "Evil"], "vae": ["evil", "Evil"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    for name, auto in (
        ("text_encoder/config.json", {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}),
        ("vae/config.json", {"AutoModel": "modeling_evil.Evil"}),
        ("transformer/config.json", {"AutoModel": "modeling_evil.Evil"}),
    ):
        config = json.loads((pipeline / name).read_text())
        (pipeline / name).write_text(json.dumps(config | {"auto_map": auto}))
    TextEncoder(str(pipeline))
    VideoVAE(str(pipeline))
    load_model(str(pipeline))
    path = pipeline / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
    }
    path.write_text(json.dumps(config))
    (pipeline / "tokenizer/config.json").write_text(json.dumps({"auto_map": config["auto_map"], "model_type": "evil"}))
    with pytest.raises(UserError, match="cannot load the tokenizer .* contains custom code"):
        TextEncoder(str(pipeline))
    assert not sentinel.exists()


@pytest.fixture
def hub():
    """(address, what was asked for) of a server in the hub's place, which has nothing."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=lambda: web.serve_forever(poll_interval=0.05), daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


def resolved(names: list[str], environment: dict[str, str]) -> list[str]:
    """In a fresh process, as the hub's library reads its environment once: where each pipeline lies, or the error."""
    code = """
import json, sys
from fvtitan.errors import UserError
from fvtitan.models.pipeline import pipeline_folder
for name in json.loads(sys.argv[1]):
    try:
        print(pipeline_folder(name, "transformer"))
    except UserError as error:
        print(f"error: {error}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.splitlines()


def test_offline_is_offline_and_a_revision_is_that_revision(tmp_path, hub):
    """A hub's cache with two commits of one repository; the branch points to the second."""
    address, asked = hub
    repository = tmp_path / "home/hub/models--owner--name"
    commits = {"1" * 40: "first", "2" * 40: "second"}
    for commit, content_ in commits.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text(json.dumps({"which": content_}))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("2" * 40)
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": address,
        "HF_HUB_CACHE": str(tmp_path / "home/hub"),
    }
    names = ["owner/name", f"owner/name@{'1' * 40}", "owner/name@main", "owner/name@v9", "owner/other", "owner/name@"]
    found = resolved(names, {**environment, "HF_HUB_OFFLINE": "1"})
    assert asked == []
    assert [Path(line).name for line in found[:3]] == ["2" * 40, "1" * 40, "2" * 40]
    for line, name in zip(found[3:5], names[3:5], strict=True):
        assert line.startswith(f"error: '{name}' is no folder here, and not in the hub's cache ")
    assert found[5].endswith("nor a hub id (owner/name or owner/name@revision)")
    resolved(["owner/name@v9"], {**environment, "HF_HUB_OFFLINE": "0"})
    assert any(
        "owner/name/revision/v9" in path for path in asked
    )  # the server would have been asked, for that revision


# ------------------------------------------------------------------------------------------------------ secrets


def test_secrets_are_taken_out(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("hf_token", 'h\\f"_token')
    monkeypatch.setenv("SHORT_KEY", "tiny")
    monkeypatch.setenv("KEY_FOLDER", str(tmp_path))  # a path is none
    monkeypatch.setenv("INNOCENT", "tiny-wan-or-not")
    text = f"a 0123456789abcdef b {json.dumps(os.environ['hf_token'])} c {os.environ['hf_token']!r} {tmp_path} tiny-wan-or-not"
    assert redacted(text) == f"a *** b \"***\" c '***' {tmp_path} tiny-wan-or-not"


def test_no_secret_in_what_a_run_writes_and_prints(tmp_path, monkeypatch, capfd):
    """The value of a token, in a description and in an error: not in any file, not on the console."""
    monkeypatch.setenv("SOME_TOKEN", "s3cret-s3cret")
    cache = make_cache(tmp_path / "cache", 4)
    told: list[dict] = []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=lambda row: None, finish=lambda exit_code: None)
    wandb = types.ModuleType("wandb")
    wandb.util = types.SimpleNamespace(generate_id=lambda: "id")
    wandb.init = lambda **options: told.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("fvtitan.components.metrics._check_wandb", lambda: None)  # as if it were installed
    keys = {"training__steps": 1, "metrics__enable_tensorboard": True, "job__description": "with s3cret-s3cret"}
    keys["metrics__enable_wandb"] = True
    assert train(small_arguments(cache, tmp_path / "run", **keys)) == 0
    monkeypatch.setattr(
        LatentCache, "__getitem__", lambda self, index: (_ for _ in ()).throw(UserError("s3cret-s3cret!"))
    )
    assert train(small_arguments(cache, tmp_path / "run", **{**keys, "training__steps": 2})) == 2
    assert json.loads((tmp_path / "run/status.json").read_text())["reason"] == "***!"
    assert 'description = "with ***"' in (tmp_path / "run/config.toml").read_text()
    assert told[0]["config"]["job"]["description"] == "with ***" and told[0]["config"]["training"]["steps"] == 1
    assert "s3cret" not in str(told)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if b"s3cret" in path.read_bytes()]
    out, err = capfd.readouterr()
    assert "***" in out and "error: ***!" in err and "s3cret" not in out + err


def test_a_run_alone_opens_no_port_to_others(monkeypatch):
    """Its gloo listens on the loopback interface, whatever address the host's name has; the variable goes with it."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("RANK", raising=False)

    def listening() -> set[str]:
        names = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        own = {name[8:-1] for name in names if name.startswith("socket:[")}
        lines = [line for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()[1:]]
        return {row[1] for row in map(str.split, lines) if row[3] == "0A" and row[9] in own}

    before = listening()
    init_distributed(CommConfig())
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    opened = listening() - before
    close_distributed()
    assert {address.split(":")[0] for address in opened} == {"0100007F"} and interface == "lo"
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_no_secret_in_a_stack_trace(monkeypatch):
    code = "from fvtitan.errors import cli\ndef main():\n    raise RuntimeError('at https://s3cret-s3cret@host')\ncli(main)"
    environment = {**os.environ, "A_PASSWORD": "s3cret-s3cret"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: at https://***@host\n")
    assert "s3cret" not in done.stdout + done.stderr and "Traceback" in done.stderr


def test_torchrun_is_told_of_errors_that_are_not_bad_input(tmp_path, monkeypatch, capsys):
    """What is in the file, torchrun prints as the traceback of the rank that failed first."""
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    monkeypatch.setenv("A_PASSWORD", "s3cret-s3cret")
    assert train(["--training.steps", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: training.steps = 0") and not told.exists()

    def fails() -> None:
        raise RuntimeError("at https://s3cret-s3cret@host")

    with pytest.raises(RuntimeError):
        cli(fails)
    message = json.loads(told.read_text())["message"]
    assert message["message"] == "RuntimeError: at https://***@host"
    assert "in fails" in message["extraInfo"]["py_callstack"] and "s3cret" not in told.read_text()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none/error.json"))
    with pytest.raises(RuntimeError, match="at https"):
        cli(fails)


def test_a_secret_that_would_change_the_written_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "checkpoints")
    arguments = ["--models.student.init_from", "/data/checkpoints/a", "--job.description", "of checkpoints"]
    with pytest.raises(UserError, match=r"models.student.init_from = '/data/\*\*\*/a': \*\*\* is the value of an env"):
        load_config(arguments)
    monkeypatch.setenv("SOME_KEY", "other-value")
    monkeypatch.setenv("A_KEY", "of checkpoints")
    assert load_config(arguments[2:]).to_dict()["job"]["description"] == "***"


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_files_of_a_run_have_the_users_mask(tmp_path, mask):
    cache = make_cache(tmp_path / "cache", 4)
    before = os.umask(mask)
    try:
        keys = {"training__steps": 1, "metrics__enable_tensorboard": mask == 0o027}
        assert train(small_arguments(cache, tmp_path / "run", **keys)) == 0
    finally:
        os.umask(before)
    paths = list((tmp_path / "run").rglob("*"))
    assert {"lock", "status.json", "config.toml", "manifest.json", ".metadata"} <= {path.name for path in paths}
    wrong = [p for p in paths if stat.S_IMODE(p.stat().st_mode) != (0o777 if p.is_dir() else 0o666) & ~mask]
    assert wrong == []


def test_compiled_code_is_kept_where_only_the_user_writes(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"fvtitan-compiled-{os.getuid()}"
    for _ in range(2):
        apply_compile(random_transformer(), "inductor")
        assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    with pytest.raises(UserError, match=f"{folder}: compiled code .* set TORCHINDUCTOR_CACHE_DIR"):
        apply_compile(random_transformer(), "inductor")
    folder.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="others could write it"):
        apply_compile(random_transformer(), "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    apply_compile(random_transformer(), "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")


@pytest.mark.slow
def test_compiled_code_is_not_where_others_could_foresee_it(tmp_path):
    """Inductor's own build, in a fresh process with a temporary folder of its own."""
    code = """
import torch
from fvtitan.distributed.parallelize import apply_compile
from tests.helpers import random_transformer
apply_compile(random_transformer(), "inductor")
torch.compile(lambda x: x.sin() + 1)(torch.rand(64))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment["TMPDIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, timeout=600)
    built = [
        path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.suffix in (".so", ".py", ".cpp")
    ]
    assert set(built) == {f"fvtitan-compiled-{os.getuid()}"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_compiled_code_of_another_user_is_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"fvtitan-compiled-{os.getuid()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(UserError, match="it must be a folder of yours"):
        apply_compile(random_transformer(), "inductor")
