"""The closed forms of FLOPs and the methods' passes against torch's FlopCounterMode, on the real code."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fvtitan.config import RoleConfig
from fvtitan.distributed.mesh import Mesh
from fvtitan.flops import Flops, PhaseFlops, device_rates, named_peak, phase_flops, roofline_seconds
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.methods import METHODS
from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.passes import Pass, expected
from fvtitan.models import build_roles
from fvtitan.models.base import Conditioning
from fvtitan.models.blocks import block_starts
from fvtitan.models.wan.flops import forward_flops
from fvtitan.models.wan.model import WanCausalModel
from fvtitan.models.wan.transformer import FLAVORS, WanConfig, WanTransformer
from tests.helpers import dmd2_recipe, kd_recipe, make_cache, self_forcing_recipe, small_config

FRAMES, HEIGHT, WIDTH = CLIP = 21, 60, 104  # latents of 81 frames of 480 x 832

# ------------------------------------------------------------------------------------------------------ closed forms


def counted(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def meta_model(sizes: WanConfig, **causal: object) -> WanCausalModel:
    with torch.device("meta"):
        transformer = WanTransformer(sizes).to(torch.bfloat16)
    role = RoleConfig(name="wan_causal", flavor="tiny", attention_backend="sdpa", **{"frames_per_block": 3, **causal})
    role.check("student")
    common = {"dtype": torch.bfloat16, "schedule": ScheduleConfig(), "device": torch.device("meta")}
    return WanCausalModel(transformer, role, trainable=True, **common)


def meta_inputs(
    sizes: WanConfig, frames: int = FRAMES, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    latents = torch.empty(batch, frames, sizes.in_channels, HEIGHT, WIDTH, device="meta")
    text = torch.empty(batch, sizes.text_len, sizes.text_dim, device="meta")
    return latents, torch.empty(batch, frames, device="meta"), Conditioning(text)


@torch.no_grad()
def full_forward(sizes: WanConfig) -> int:
    latents, sigma, cond = meta_inputs(sizes)
    return counted(lambda: meta_model(sizes).transformer(latents, sigma, cond.text))


@pytest.mark.parametrize(
    ("flavor", "tflop"), [("1.3B", [82.1, 197.8, 3.1, 283.0]), ("14B", [785.4, 879.2, 13.7, 1678.4])]
)
def test_full_attention(flavor, tflop):
    """81 frames of 480 x 832, exactly; and TFLOP of linear, self-attention, cross-attention and everything."""

    def closed(layers: int) -> Flops:
        sizes = dataclasses.replace(FLAVORS[flavor], num_layers=layers)
        return forward_flops(Pass("student", FRAMES), sizes, None, HEIGHT, WIDTH)

    for layers in (1, 2):
        assert closed(layers).total == full_forward(dataclasses.replace(FLAVORS[flavor], num_layers=layers))
    whole = closed(FLAVORS[flavor].num_layers)
    assert whole.total == closed(1).total + (FLAVORS[flavor].num_layers - 1) * (closed(2).total - closed(1).total)
    parts = (whole.linear, whole.self_attention, whole.cross_attention, whole.total)
    assert [round(part / 1e12, 1) for part in parts] == tflop


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["1.3B", "14B"])
def test_full_attention_of_all_layers(flavor):
    sizes = FLAVORS[flavor]
    assert forward_flops(Pass("student", FRAMES), sizes, None, HEIGHT, WIDTH).total == full_forward(sizes)


ONE_LAYER = dataclasses.replace(FLAVORS["1.3B"], num_layers=1)
CAUSAL = {
    "all": {},
    "frames": {"frames_per_block": 1},
    "one_block": {"frames_per_block": 21},
    "window": {"local_attn_frames": 9},
    "odd_window": {"local_attn_frames": 7},
    "sink": {"local_attn_frames": 7, "sink_frames": 2},
    "sink_over_block": {"local_attn_frames": 3, "sink_frames": 4},
    "first_frame": {"frames_per_block": 4, "independent_first_frame": True, "local_attn_frames": 8, "sink_frames": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("keys", CAUSAL.values(), ids=CAUSAL)
def test_block_causal_and_clean_context(keys):
    """One call of attention a block, as the sdpa backend makes it, so the counter is exact."""
    model = meta_model(ONE_LAYER, **keys)
    latents, sigma, cond = meta_inputs(ONE_LAYER)
    found = counted(lambda: model.predict_velocity(latents, sigma, cond))
    p = Pass("student", FRAMES, attention="block_causal")
    assert forward_flops(p, ONE_LAYER, model.causal, HEIGHT, WIDTH).total == found
    found = counted(lambda: model.predict_velocity_with_context(latents, sigma, latents, sigma, cond))
    p = Pass("student", FRAMES, attention="clean_context")
    assert forward_flops(p, ONE_LAYER, model.causal, HEIGHT, WIDTH).total == found


@torch.no_grad()
@pytest.mark.parametrize("keys", CAUSAL.values(), ids=CAUSAL)
def test_streams(keys):
    """Blocks of different numbers of forwards, without gradient: the text is embedded once."""
    model, sizes = meta_model(ONE_LAYER, **keys), ONE_LAYER
    latents, sigma, cond = meta_inputs(sizes, batch=2)
    spans = block_starts(model.causal.blocks(FRAMES))
    forwards = [1 + i % 3 for i in range(len(spans))]

    def stream() -> None:
        cache = model.new_cache(latents.shape)
        for (start, end), count in zip(spans, forwards, strict=True):
            for _ in range(count - 1):
                model.predict_velocity_streaming(latents[:, start:end], sigma[:, start:end], cond, cache, start)
            model.commit(latents[:, start:end], cond, cache, start)

    p = Pass("student", FRAMES, tuple(map(float, forwards)), attention="streaming", texts=1.0, batch=2)
    assert forward_flops(p, sizes, model.causal, HEIGHT, WIDTH).total == counted(stream)


def test_a_stream_that_keeps_its_text_costs_what_a_block_causal_forward_does():
    causal = RoleConfig(name="wan_causal", frames_per_block=3, local_attn_frames=9, sink_frames=1).causal()
    stream = Pass("student", FRAMES, (1.0,) * 7, attention="streaming", texts=1.0)
    whole = Pass("student", FRAMES, attention="block_causal")
    assert forward_flops(stream, FLAVORS["14B"], causal, *CLIP[1:]) == forward_flops(
        whole, FLAVORS["14B"], causal, *CLIP[1:]
    )


# ----------------------------------------------------------------------------------------------------- methods' phases


def unneeded(p: Pass, sizes: WanConfig, tokens_per_frame: int, rank: int = 0) -> float:
    """FLOPs that the closed form counts and no backward does: the gradients of patches, prompts and noise levels. With an
    adapter of this rank on every layer: those of the text before its keys and values and of the tokens before the first
    block's queries, keys and values; less that of the tokens before the head, which it does not count."""
    rows = 2 * p.num_frames if p.attention == "clean_context" else p.num_frames / len(p.forwards)
    patch = math.prod(sizes.patch_size)
    tokens, dim = rows * tokens_per_frame, sizes.dim
    if rank:
        text = sizes.num_layers * 2 * sizes.text_len * 2 * dim * (dim + rank)
        return p.num_forwards * (
            text + 3 * tokens * 2 * dim * (dim + rank) - tokens * 2 * dim * sizes.out_channels * patch
        )
    patches, texts = tokens * sizes.in_channels * patch, sizes.text_len * sizes.text_dim
    return p.num_forwards * 2 * dim * (patches + texts + rows * sizes.freq_dim)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flops")


@pytest.fixture(scope="module")
def cache(folder):
    return make_cache(folder / "cache")


def built(cache, folder, recipe, **overrides: object) -> TrainingMethod:
    """The method of a run of the tiny flavor, as train.py builds it, with fewer blocks: one, the teacher two."""
    cfg = small_config(cache, folder, job__config_file=recipe, **overrides)
    kind, device = METHODS[cfg.method.name], torch.device("cpu")
    roles = build_roles(cfg, Mesh(cfg, "cpu"), device, kind.needed_roles(cfg))
    for role, model in roles.items():
        layers = 2 if role == "teacher" else 1
        del model.transformer.blocks[layers:]
        model.transformer.cfg = dataclasses.replace(model.transformer.cfg, num_layers=layers)
    method = kind(cfg=cfg, role_models=roles)
    method.on_train_start()
    return method


def batch_of(method: TrainingMethod, size: int = 2) -> dict[str, object]:
    samples = [method.data[i] for i in range(size)]
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch |= {key: torch.stack(batch[key]) for key in ("latents", "states") if key in batch}
    index = torch.arange(size)
    ids = {"sample_ids": [str(i) for i in range(size)]}
    return batch | ids | {"positions": index, "sample_indices": index, "sample_passes": torch.zeros(size).int()}


def check_phase(method: TrainingMethod, step: int, role: str) -> None:
    """`passes` say what single_train_step and its backward do, to the FLOP."""
    batch, cfg = batch_of(method), method.cfg

    def phase() -> None:
        loss, _ = method.single_train_step(batch, step, role)
        loss.backward()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel of a CPU is not counted
        found = counted(phase)
    sizes = {name: model.transformer.cfg for name, model in method.role_models.items()}
    passes = method.passes(cfg, role, method.exit_rungs(step, role))
    (b, *_, h, w) = method.latent_shape(batch)
    flops = phase_flops(cfg, passes, sizes, h, w)
    tokens = h * w // math.prod(sizes["student"].patch_size)
    less = sum(unneeded(p, sizes[p.role], tokens, cfg.models[p.role].lora.rank) for p in passes if p.gradient)
    assert found == pytest.approx(b * (flops.hardware - less), rel=1e-12)
    for module in method.role_modules.values():
        module.zero_grad()


def write(path, text: str):
    path.write_text(text)
    return path


BLOCKS = 'name = "wan_causal"\nframes_per_block = 1\n'


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("ac", ["none", "full"])
@pytest.mark.parametrize(
    ("student", "method"),
    [
        ("", 'name = "finetune"'),
        (BLOCKS, 'name = "dfsft"'),
        (BLOCKS + "local_attn_frames = 2\n", 'name = "dfsft"\nteacher_forcing = true\ncontext_noise_max = 10.0'),
    ],
    ids=["finetune", "dfsft", "teacher_forcing"],
)
def test_fine_tuning(cache, tmp_path, student, method, ac):
    recipe = write(tmp_path / "r.toml", f'[models.student]\nflavor = "tiny"\n{student}[method]\n{method}\n')
    check_phase(built(cache, tmp_path, recipe, activation_checkpoint__mode=ac), 1, "student")


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("ac", ["none", "full"])
def test_an_adapter(cache, tmp_path, ac):
    """Without the gradients of the weights under it."""
    text = '[models.student]\ninit_from = "tiny-wan"\n[models.student.lora]\nrank = 8\n'
    method = built(cache, tmp_path, write(tmp_path / "r.toml", text), activation_checkpoint__mode=ac)
    check_phase(method, 1, "student")


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize(
    "keys", [{"name": "kd"}, {"name": "kd_causal"}, {"name": "kd_causal", "teacher_forcing": True}]
)
def test_distillation_on_trajectories(cache, tmp_path, keys):
    recipe = kd_recipe(tmp_path, num_trajectories=2, teacher_inference_steps=2, **keys)
    check_phase(built(cache, tmp_path, recipe), 1, "student")


def check_all_rungs(method: TrainingMethod) -> None:
    """Both phases at every exit, and the mean over the draws."""
    cfg = method.cfg
    for role in ("student", "critic"):
        last = len(cfg.method.denoising_steps) - 1
        for rung in {last} if getattr(cfg.method, "last_step_only", False) else (0, last):
            check_phase(method, next(s for s in range(1, 999) if method.exit_rungs(s, role)[0] == rung), role)


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rollout": "data", "batched_guidance": True},
        {"teacher_guidance_scale": 1.0, "cfg_uncond": "keep", "denoising_steps": [1000.0, 500.0]},
    ],
    ids=["simulate", "data", "no_guidance"],
)
def test_dmd2(cache, tmp_path, keys):
    check_all_rungs(built(cache, tmp_path, dmd2_recipe(tmp_path, **keys)))


LONG = {"local_attn_frames": 2, "sink_frames": 1}
SELF_FORCING = {
    "direct": ({}, {}, {}),
    "replay": ({}, {"gradient_mode": "replay", "context_noise": 10.0}, {}),
    "own_exits": ({}, {"same_step_across_blocks": False, "student_sample_type": "ode"}, {}),
    "full_ac": (LONG, {"last_step_only": True}, {"activation_checkpoint__mode": "full"}),
    "full_ac_replay": ({}, {"gradient_mode": "replay"}, {"activation_checkpoint__mode": "full"}),
    "one_block": ({"frames_per_block": 3}, {"batched_guidance": True}, {}),
    "late_gradient": ({}, {"start_gradient_frame": 1}, {}),
}


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize(
    ("student", "keys", "overrides"),
    [
        pytest.param(*case, id=name, marks=[] if name in ("replay", "own_exits", "full_ac") else pytest.mark.slow)
        for name, case in SELF_FORCING.items()
    ],
)
def test_self_forcing(cache, tmp_path, student, keys, overrides):
    recipe = self_forcing_recipe(tmp_path, {"student": student}, denoising_steps=[1000.0, 750.0, 500.0], **keys)
    check_all_rungs(built(cache, tmp_path, recipe, **overrides))


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("mode", ["direct", pytest.param("replay", marks=pytest.mark.slow)])
def test_long_rollouts(cache, tmp_path, mode):
    """Of every length, with masked blocks; and the draws have the mean that `passes` gives without them."""
    recipe = self_forcing_recipe(tmp_path, {"student": LONG}, max_num_frames=17, gradient_mode=mode)
    method = built(cache, tmp_path, recipe)
    for blocks in (3, 4, 5):
        step = next(s for s in range(1, 999) if len(method.exit_rungs(s, "student")) == blocks)
        check_phase(method, step, "student")
    sizes = {role: FLAVORS["tiny"] for role in method.role_models}
    for role in ("student", "critic"):
        mean = phase_flops(method.cfg, method.passes(method.cfg, role), sizes, 4, 4)
        drawn = [
            phase_flops(method.cfg, method.passes(method.cfg, role, method.exit_rungs(step, role)), sizes, 4, 4).model
            for step in range(1, 1001)
        ]
        assert sum(drawn) / len(drawn) == pytest.approx(mean.model, rel=0.04)


def test_the_mean_of_outcomes():
    a, b = Pass("student", 3, (1.0, 2.0), texts=1.0), Pass("critic", 3, gradient=True)
    once = Pass("student", 3, (3.0, 4.0), texts=0.0)
    assert expected([[a, b], [once, b]]) == [dataclasses.replace(a, forwards=(2.0, 3.0), texts=0.5), b]
    assert expected([[a], []]) == [dataclasses.replace(a, forwards=(0.5, 1.0), texts=0.5)]


def test_selective_checkpointing_repeats_the_matrices_alone(cache, tmp_path):
    recipe = write(tmp_path / "r.toml", '[models.student]\nflavor = "tiny"\n[method]\nname = "finetune"\n')
    cfg = small_config(cache, tmp_path, job__config_file=recipe)
    cfg.activation_checkpoint.mode = "selective"
    passes, sizes = METHODS["finetune"].passes(cfg, "student"), FLAVORS["tiny"]
    forward = forward_flops(passes[0], sizes, None, 4, 4)
    flops = phase_flops(cfg, passes, {"student": sizes}, 4, 4)
    assert flops == PhaseFlops(3 * forward.total, 3 * forward.total + forward.linear)


# --------------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("flavor", "kernel", "seconds"),
    [
        ("1.3B", "cudnn", [1.69, 1.82, 2.15]),
        ("1.3B", "flash", [2.48, 2.61, 3.15]),
        ("14B", "cudnn", [9.45, 10.7, 12.2]),
    ],
)
def test_the_roofline_of_a_training_step(flavor, kernel, seconds):
    """A step on 81 frames of 480 x 832 on an H100 without checkpointing, selective and full, worked out by hand."""
    forward = forward_flops(Pass("student", FRAMES), FLAVORS[flavor], None, HEIGHT, WIDTH)
    modes = ("none", "selective", "full")
    found = [roofline_seconds(forward, 989e12, gradient=True, mode=mode, kernel=kernel) for mode in modes]
    assert found == pytest.approx(seconds, rel=0.01)


def test_rates_of_a_device():
    """FLOPs are the whole job's, the peak is one device's."""
    flops = PhaseFlops(model=8e12, hardware=10e12)
    assert device_rates(flops, seconds=2.0, num_devices=4) == {"perf/tflops_per_device": 1.0}
    rates = device_rates(flops, seconds=2.0, num_devices=4, peak_tflops=5.0)
    assert rates == pytest.approx({"perf/tflops_per_device": 1.0, "perf/mfu": 0.2, "perf/hfu": 0.25})
    assert Flops(1, 2, 3, 4).recomputed("none") == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 0),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 0),
    ],
)
def test_peaks_by_name(name, peak):
    assert named_peak(name) == peak
