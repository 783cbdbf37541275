"""Train a video diffusion transformer: one flat function, made to be read from top to bottom, copied and edited.

./run_train.sh                                                     # the default job, on this machine
CONFIG_FILE=train_configs/wan2.1_t2v_1.3b_finetune.toml NGPU=8 ./run_train.sh --training.steps 2000
torchrun --nproc_per_node=2 train.py --job.config_file FILE [--section.key value ...]
python train.py --job.config_file FILE
"""

import contextlib
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fvtitan
from fvtitan.components import faults
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.ema import EMA
from fvtitan.components.files import write_atomic
from fvtitan.components.metrics import MetricLogger
from fvtitan.components.nonfinite import NonFinite
from fvtitan.components.resume import check_changes
from fvtitan.components.rng import seed_global_generators
from fvtitan.components.stateful import TrainState
from fvtitan.components.stops import Stops
from fvtitan.components.validation import Validator, forget_validations, is_validated
from fvtitan.components.watchdog import Watchdog
from fvtitan.config import load_config
from fvtitan.data.dataloader import BatchStream
from fvtitan.data.prepare import prepare_data
from fvtitan.distributed.mesh import Mesh, data_ranks
from fvtitan.distributed.utils import (
    clip_grad_norm,
    close_distributed,
    init_distributed,
    log,
    mean_over_ranks,
    on_rank_zero,
    reshard,
)
from fvtitan.errors import cli
from fvtitan.flops import phase_flops
from fvtitan.methods import METHODS
from fvtitan.models import build_roles
from fvtitan.models.wan.attention import pinned_kernels


def main() -> int:
    # ------------------------------------------------------------------------------------------ configuration
    cfg = load_config(sys.argv[1:])
    dump_folder = Path(cfg.job.dump_folder)

    # ------------------------------------------------------------- device, process group, mesh, random state
    device = init_distributed(cfg.comm, dump_folder)
    with contextlib.ExitStack() as at_exit:  # what is registered here runs in reverse order, however the run ends
        at_exit.callback(close_distributed)
        stops = at_exit.enter_context(Stops(dump_folder, cfg.comm.stop_grace_seconds, cfg.comm.timeout))
        watchdog = at_exit.enter_context(Watchdog(dump_folder, cfg.comm.timeout_seconds, stops))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        log(f"{cfg.job.description or cfg.job.config_file}: {world_size} x {device.type}, torch {torch.__version__}")
        mesh, (data_rank, data_world) = Mesh(cfg, device.type), data_ranks(cfg)
        seed_global_generators(cfg.training.seed, rank)
        if cfg.training.deterministic:
            torch.use_deterministic_algorithms(True)
        kernels = at_exit.enter_context(pinned_kernels(cfg.training.deterministic))
        gc.disable()  # collected every training.gc_freq steps, on all ranks together

        # ----------------------------------------------------------------------------------------------- data
        prepare_data(cfg)

        # ----------------------------------------------- roles, method (optimizers and schedules by role)
        method_class = METHODS[cfg.method.name]
        roles = build_roles(cfg, mesh, device, method_class.needed_roles(cfg))
        method = method_class(cfg=cfg, role_models=roles)
        method.on_train_start()
        if method.description():
            log(method.description())
        if kernel := method.student.attention_kernel(cfg):
            log(f"attention: {kernel}, the first that can of {kernels}")

        # ------------------------------------------------------------------------ loader, EMA, what is saved
        batches = BatchStream(
            method.data,
            global_batch_size=cfg.global_batch_size(world_size),
            local_batch_size=cfg.training.local_batch_size,
            seed=cfg.training.seed,
            dp_rank=data_rank,
            dp_world=data_world,
            num_workers=cfg.data.num_workers,
            pin_memory=device.type == "cuda",
            timeout_seconds=cfg.comm.timeout_seconds / 2,  # before the other ranks give up
            allow_changed=cfg.checkpoint.allow_changed,
        )
        at_exit.callback(batches.close)
        ema = EMA(method.student, cfg.ema) if cfg.ema.enable else None
        train_state = TrainState()
        states = method.checkpoint_state() | {"dataloader": batches, "train_state": train_state}
        if ema is not None:
            states["ema.student"] = ema

        # ----------------------------------------- resume: own folder > initial_load_path > initial weights
        checkpointer = None
        if cfg.checkpoint.enable:
            checkpointer = Checkpointer(
                dump_folder / "checkpoint",
                keep_latest_k=cfg.checkpoint.keep_latest_k,
                async_mode=cfg.checkpoint.async_mode,
                on_failed_save=cfg.checkpoint.on_failed_save,
                timeout=cfg.comm.timeout,
            )
            at_exit.push(checkpointer)  # closes it
            source = checkpointer.find(cfg.checkpoint)
            if source is not None:
                for change in on_rank_zero(lambda: check_changes(source, cfg, cfg.checkpoint.allow_changed)):
                    log(change)
                for module in method.role_modules.values():
                    reshard(module)
                switched = ("ema.student",) if "ema.enable" in cfg.checkpoint.allow_changed else ()
                lacking = checkpointer.load(source, states, allow_missing=switched, allow_unexpected=switched)
                if "ema.student" in lacking:
                    ema.restart()  # as a copy of the loaded student
                method.apply_hyper_parameters()
                log(f"resumed from {source}: {train_state.step} of {cfg.training.steps} steps are done")
            else:
                log("no checkpoint to resume from: a fresh start")
        stops.step = step = train_state.step
        first_step = step + 1
        owes_validation = False  # a job that was killed in the validation after its last step is not finished
        if step == cfg.training.steps and cfg.validation.enable:
            owes_validation = not on_rank_zero(lambda: is_validated(dump_folder, step))
        if first_step > cfg.training.steps and not owes_validation:
            log(f"this job is finished: {step} of {cfg.training.steps} steps are done; nothing to do")
            return 0

        # ------------------------------------------------------------------------------- metrics, validation
        if rank == 0:
            write_atomic(dump_folder / "config.toml", cfg.to_toml())
            forget_validations(dump_folder, after=step)
        metrics = MetricLogger(
            dump_folder,
            rank=rank,
            log_freq=cfg.metrics.log_freq,
            total_steps=cfg.training.steps,
            resume_step=train_state.step,
            enable_tensorboard=cfg.metrics.enable_tensorboard,
            enable_wandb=cfg.metrics.enable_wandb,
            device=device,
            num_devices=world_size,
            peak_tflops=cfg.metrics.peak_tflops,
            config=cfg.to_dict(),
        )
        at_exit.push(metrics)  # closes it
        metrics.add_text("config", f"```toml\n{cfg.to_toml()}```", train_state.step)
        validator = Validator(cfg, method, metrics, device) if cfg.validation.enable else None
        if owes_validation:
            with watchdog.resting(f"validation of step {step}"):
                validator.run(step, ema, last=True)

        # ------------------------------------------------------------------------------------- the train loop
        accumulation = batches.accumulation
        network_sizes = {role: model.transformer.cfg for role, model in roles.items()}
        values: dict[str, torch.Tensor | float] = {}  # the newest of every role since the last logged step
        nonfinite = NonFinite(cfg.training.nonfinite, cfg.training.max_nonfinite_skips, train_state)
        for step in range(first_step, cfg.training.steps + 1):
            watchdog.beat(f"the start of step {step}")
            stops.begin_step()
            faults.reach("step", step)
            if step % cfg.training.gc_freq == 0:
                gc.collect()
            tokens = 0
            for role in method.phases(step):
                module, optimizer = method.role_modules[role], method.optimizers[role]
                phase: dict[str, torch.Tensor | float] = {}
                samples: list[str] = []
                for micro_batch in range(accumulation):
                    watchdog.beat(f"step {step}, {role}, micro-batch {micro_batch}")
                    with metrics.meter.waiting():
                        batch = next(batches)
                    samples += batch["sample_ids"]
                    last = micro_batch == accumulation - 1
                    module.set_requires_gradient_sync(last or not cfg.parallelism.defer_grad_sync)
                    loss, extra = method.single_train_step(batch, step, role)
                    loss = faults.spoil("loss", loss, step)
                    # Every sample of the global batch weighs the same. 0 * loss: one that is not finite makes all gradients
                    # NaN, and so the norm on all ranks, whatever its derivative is.
                    loss.backward((1 + 0 * loss.detach()) / accumulation)
                    for name, value in {f"loss/{role}": loss, **extra}.items():
                        phase[name] = phase.get(name, 0.0) + value.detach() / accumulation

                targets = method.get_grad_clip_targets(role)
                faults.spoil_gradient(targets, step)
                grad_norm = clip_grad_norm(targets, cfg.training.max_norm)
                values |= phase | {f"grad_norm/{role}": grad_norm, f"lr/{role}": optimizer.param_groups[0]["lr"]}
                # The norm is global: either every rank updates or none. The only host sync of an optimizer step.
                if torch.isfinite(grad_norm):
                    optimizer.step()
                    method.lr_schedulers[role].step()  # counts updates: a skipped one leaves the role as it was
                    if ema is not None and role == "student":
                        ema.update(step)
                else:
                    numbers = {"norm": float(grad_norm), "loss": float(phase[f"loss/{role}"])}
                    nonfinite.skip(step, role, **numbers, samples=samples, cause=method.not_finite())  # or raises
                optimizer.zero_grad()
                # Of this phase: sizes may differ.
                shape, clip_cfg = method.latent_shape(batch), method.clip_config(batch)
                tokens += method.student.num_tokens(network_sizes["student"], shape) * accumulation * data_world
                passes = method.passes(clip_cfg, role, method.exit_rungs(step, role))
                flops = phase_flops(clip_cfg, passes, network_sizes, *shape[-2:])
                metrics.meter.count_flops(flops * batches.sampler.global_batch_size)
            train_state.step = step

            metrics.meter.count(clips=len(method.phases(step)) * batches.sampler.global_batch_size, tokens=tokens)
            if metrics.due(step):
                values = mean_over_ranks(values, device)
                metrics.log_step(step, values | {"nonfinite_skips": train_state.nonfinite_skips})
                for warning in method.warnings(values):
                    log(f"WARNING, step {step}: {warning}")
                values = {}

            if checkpointer is not None:
                checkpointer.maybe_finish()  # an asynchronous save that failed must not go unnoticed
            final = step == cfg.training.steps
            asked = stops.end_step(step, last=final)
            saves = final or asked.stop or asked.save or step % cfg.checkpoint.interval == 0
            validates = final or asked.validate or (step % cfg.validation.interval == 0 and not asked.stop)
            # Saved first: a validation that fails costs no training.
            with metrics.meter.excluded(), watchdog.resting(f"checkpoint, validation of step {step}"):
                if checkpointer is not None and saves:
                    versions = {"fvtitan": fvtitan.__version__, "torch": torch.__version__, "world_size": world_size}
                    sizes = {role: model.sizes for role, model in roles.items() if model.trainable}
                    files = {"config.toml": cfg.to_toml(), "versions.json": json.dumps(versions, indent=2)}
                    files["roles.json"] = json.dumps(sizes, indent=2)
                    checkpointer.save(step, states, extra_files=files, last=final or bool(asked.stop))
                if validator is not None and validates:
                    validator.run(step, ema, last=final)
            if asked.stop:
                break

        # --------------------------------------------------------------------------------------------- the end
        if checkpointer is not None:
            checkpointer.wait()
        if stops.exit_code:
            saved = "the same command goes on from here" if checkpointer is not None else "nothing is saved"
            log(f"stopped after step {step} of {cfg.training.steps} ({stops.reason}); {saved}")
            return stops.exit_code
        log(f"finished {step} steps. Look at:")
        log(f"  {dump_folder / 'metrics.jsonl'}  and  tensorboard --logdir {dump_folder / 'tensorboard'}")
        if validator is not None:
            log(f"  {validator.folder / f'step-{step}'}: videos and contact_sheet.png")
        return 0


if __name__ == "__main__":
    cli(main)
