"""One record a step, whatever was killed, resumed or not a number."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import types

import pytest
import torch
from PIL import Image

from fvtitan.components.metrics import MetricLogger, ThroughputMeter, duration, read_metrics, truncate_metrics
from fvtitan.errors import UserError
from fvtitan.flops import PhaseFlops


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def train(folder, first, last, *, loss=lambda step: 1.0 / step, **options):
    log = MetricLogger(folder, total_steps=options.pop("total_steps", 100), resume_step=first - 1, **options)
    for step in range(first, last + 1):
        with log.meter.waiting():
            pass
        log.meter.count(clips=8, tokens=1152)
        log.log_step(step, {"loss/student": torch.tensor(loss(step)), "lr/student": 1e-3})
    log.close()


def test_records_are_flat_and_exact(tmp_path, capsys):
    train(tmp_path, 1, 5, log_freq=2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 4]
    assert records[1]["loss/student"] == torch.tensor(0.5).item() and records[1]["lr/student"] == 1e-3
    assert set(records[0]) == {"step", "loss/student", "lr/student"} | {
        f"perf/{name}"
        for name in ("clips_per_second", "tokens_per_second", "data_wait", "step_seconds", "peak_memory_gib")
    }
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step 2/100  loss 0.5000  lr 1.0e-03  clips/s ")
    for word in ("tokens/s ", "data ", "%  mem ", "GiB  eta "):
        assert word in lines[1]


def test_the_last_step_is_logged_and_other_ranks_write_nothing(tmp_path, capsys):
    train(tmp_path / "a", 1, 5, log_freq=3, total_steps=5)
    assert [record["step"] for record in read_metrics(tmp_path / "a" / "metrics.jsonl")] == [1, 3, 5]
    capsys.readouterr()
    train(tmp_path / "b", 1, 5, rank=1)
    assert not (tmp_path / "b").exists() and not capsys.readouterr().out


def test_several_roles_are_named(tmp_path, capsys):
    log = MetricLogger(tmp_path, total_steps=9, enable_tensorboard=False)
    log.log_step(1, {"loss/student": 0.25, "loss/critic": 12345.0, "grad_norm/critic": 1.5, "dmd/weight": 3.0})
    log.close()
    line = capsys.readouterr().out
    assert "loss/student 0.2500  loss/critic 1.23e+04  grad_norm 1.5000  mem" in line and "dmd" not in line
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["dmd/weight"] == 3.0


def test_tensors_are_read_only_on_logged_steps(tmp_path):
    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, kinds, args=(), kwargs=None):
            raise AssertionError(f"{func} on a step that is not logged")

    log = MetricLogger(tmp_path, total_steps=100, log_freq=10, enable_tensorboard=False)
    value = torch.zeros(()).as_subclass(Untouchable)
    log.log_step(3, {"loss/student": value})
    with pytest.raises(AssertionError, match="not logged"):
        log.log_step(10, {"loss/student": value})
    log.close()


def test_non_finite_values_stay_valid_json(tmp_path):
    train(tmp_path, 1, 3, loss=lambda step: [math.nan, math.inf, -math.inf][step - 1])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["loss/student"] for record in raw] == ["nan", "inf", "-inf"]
    back = [record["loss/student"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert math.isnan(back[0]) and back[1:] == [math.inf, -math.inf]


def test_validation_joins_the_record_of_its_step(tmp_path, capsys):
    log = MetricLogger(tmp_path, total_steps=20, log_freq=5)
    log.log_step(5, {"loss/student": 0.5})
    log.log(5, {"validation/loss": torch.tensor(0.25)})
    log.log(7, {"judge/colour": 0.75})
    log.log_step(10, {"loss/student": 0.4})
    with pytest.raises(ValueError, match="step 9 is logged after step 10"):
        log.log(9, {"judge/colour": 1.0})
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [5, 7, 10]
    assert records[0]["loss/student"] == 0.5 and records[0]["validation/loss"] == 0.25
    assert "step 5/20  validation/loss 0.2500" in capsys.readouterr().out


@pytest.mark.faults
def test_resume_leaves_no_step_twice(tmp_path):
    """Fault 41."""
    train(tmp_path, 1, 8)  # killed at step 8, the newest checkpoint is step 5
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "loss/stu')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    train(tmp_path, 6, 10, loss=lambda step: 100.0 + step)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:5] == before[:5]
    scalars = events(tmp_path).Scalars("loss/student")
    assert [event.step for event in scalars] == list(range(1, 11))
    assert [event.value for event in scalars] == [record["loss/student"] for record in records]


def test_values_of_the_resumed_step_join_its_record(tmp_path):
    train(tmp_path, 1, 4)
    log = MetricLogger(tmp_path, total_steps=9, resume_step=3)
    log.log(3, {"validation/loss": 0.5})
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[2]["validation/loss"] == 0.5 and "loss/student" in records[2]


def test_a_fresh_start_clears_what_an_earlier_run_left(tmp_path):
    train(tmp_path, 1, 3)
    train(tmp_path, 1, 2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_truncation_is_atomic_and_drops_damage(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[]\n{"step": 3}\n{"step": 4}\n{"st')
    content = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("os.replace", full)
        truncate_metrics(path, 3)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    truncate_metrics(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    with pytest.raises(UserError, match="line 1 "):
        path.write_bytes(b"{bad}\n{}\n")
        read_metrics(path)


def test_tensorboard_has_animated_samples_and_text(tmp_path):
    log = MetricLogger(tmp_path, total_steps=4)
    frames = (torch.arange(5)[:, None, None, None] * 40).expand(5, 16, 24, 3).to(torch.uint8)
    log.add_video("validation/0", frames, 4, fps=16)
    log.add_text("validation/prompts", "a red circle", 4)
    log.close()
    accumulator = events(tmp_path)
    (image,) = accumulator.Images("validation/0")
    assert image.step == 4 and (image.width, image.height) == (24, 16)
    assert Image.open(io.BytesIO(image.encoded_image_string)).n_frames == 5
    (text,) = accumulator.Tensors("validation/prompts/text_summary")
    assert text.tensor_proto.string_val[0] == b"a red circle"


def test_throughput(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = ThroughputMeter("cpu")
    assert meter.eta_seconds(10) is None
    for _ in range(4):
        with meter.waiting():
            now[0] += 0.5
        now[0] += 1.5
        meter.count(clips=8, tokens=100)
    with meter.excluded():
        now[0] += 100
    values = meter.read()
    assert values["perf/clips_per_second"] == 4 and values["perf/tokens_per_second"] == 50
    assert values["perf/data_wait"] == 0.25 and values["perf/step_seconds"] == 2
    assert meter.eta_seconds(10) == 20
    assert 0.01 < values["perf/peak_memory_gib"] < 100
    assert set(meter.read()) == {"perf/peak_memory_gib"}  # no step since


def test_utilisation(monkeypatch):
    """Of all phases since the last reading; shares only of a known peak."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    known, unknown = ThroughputMeter("cpu", num_devices=4, peak=10.0), ThroughputMeter("cpu", num_devices=4)
    for meter in (known, unknown):
        for _ in range(2):
            meter.count_flops(PhaseFlops(20e12, 25e12))
        meter.count(clips=8)
    now[0] += 5
    with known.excluded(), unknown.excluded():
        now[0] += 100
    values = known.read()
    assert values["perf/tflops_per_device"] == pytest.approx(2.0)
    assert values["perf/mfu"] == pytest.approx(0.2) and values["perf/hfu"] == pytest.approx(0.25)
    assert {"perf/tflops_per_device"} == {name for name in unknown.read() if "flops" in name or "fu" in name}
    now[0] += 1
    known.count(clips=8)  # a method that does not know its passes
    assert not {name for name in known.read() if "flops" in name or "fu" in name}


def test_the_line_tells_the_utilisation(tmp_path, capsys):
    for peak, shown in ((0.0, False), (3.0, True)):
        log = MetricLogger(tmp_path, total_steps=9, enable_tensorboard=False, peak_tflops=peak)
        log.meter.count(clips=8)
        log.meter.count_flops(PhaseFlops(1e9, 1e9))
        log.log_step(1, {"loss/student": 0.25})
        log.close()
        line = capsys.readouterr().out
        assert "  TFLOP/s " in line and ("  mfu " in line) is shown
        record = read_metrics(tmp_path / "metrics.jsonl")[0]
        assert ("perf/mfu" in record) is ("perf/hfu" in record) is shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (192, "3m12s"), (3599.7, "1h00m"), (7500, "2h05m"), (86400 * 3 + 4 * 3600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_wandb_needs_the_package_and_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricLogger(tmp_path, total_steps=1, enable_wandb=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        MetricLogger(tmp_path, total_steps=1, enable_wandb=True)
    assert not list(tmp_path.iterdir())


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []
    ended = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None,
        log=lambda row: logged.append(row),
        finish=lambda exit_code: ended.append(exit_code),
    )
    fake = types.ModuleType("wandb")
    fake.util = types.SimpleNamespace(generate_id=lambda: f"id{len(started)}")
    fake.init = lambda **options: started.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", "secret-token")
    train(tmp_path, 1, 2, enable_wandb=True, config={"a": 1}, enable_tensorboard=False)
    train(tmp_path, 3, 3, enable_wandb=True, enable_tensorboard=False)
    assert [options["id"] for options in started] == ["id0", "id0"] and started[0]["config"] == {"a": 1}
    assert [row["step"] for row in logged] == [1, 2, 3]
    keys = {"total_steps": 4, "resume_step": 3, "enable_wandb": True, "enable_tensorboard": False}
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as at_exit:
        at_exit.push(MetricLogger(tmp_path, **keys))
        raise ZeroDivisionError
    assert ended == [0, 0, 1]
    assert not any("secret-token" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
