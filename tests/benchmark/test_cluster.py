"""Trials on other machines: their numbers are those of this one, and no loss stops the others."""

import pickle
import resource
from dataclasses import replace

import pytest
from tqdm.auto import tqdm

from gralora_diffusion.benchmark.cluster import ATTEMPTS, Driver
from gralora_diffusion.benchmark.evaluation.results import Failure, read_results
from gralora_diffusion.benchmark.jobs import Reply, read_files, write_files
from gralora_diffusion.benchmark.ledger import Ledger, Trial, in_order
from gralora_diffusion.benchmark.main import benchmark
from gralora_diffusion.benchmark.node import run_job
from gralora_diffusion.benchmark.node_check import node_name, node_problems, requirements
from gralora_diffusion.benchmark.run_config import SETTINGS_NAME, with_absolute_paths
from gralora_diffusion.benchmark.tasks import read_tasks
from gralora_diffusion.io.errors import ConfigError
from tests.benchmark import runs
from tests.benchmark.trials import trial as result_of

DONE = {"pictures/000_0.png": b"image", "adapter/adapter.safetensors": b"weights"}


class Here:
    """A cluster that is this process, which gets everything pickled."""

    def __init__(self, answer=run_job):
        self.answer, self.jobs, self.left = answer, [], []

    def slots(self):
        return 1

    def store(self, files):
        return pickle.dumps(files)

    def submit(self, job, stored):
        self.jobs.append(job)
        self.left.append((len(self.jobs), pickle.dumps(job), stored))
        return len(self.jobs)

    def wait(self):
        ticket, job, stored = self.left.pop(0)
        reply = self.answer(pickle.loads(job), pickle.loads(stored))
        return ticket, pickle.loads(pickle.dumps(reply))


def drive(settings, engine):
    """Run the trials of these settings; return the folder's ledger and the trials."""
    trials = [Trial(*found) for found in in_order(settings, read_tasks(settings))]
    ledger = Ledger(settings.folder)
    Driver(settings, ledger, tqdm(disable=True)).run(trials, engine)
    return ledger, trials


def done(job, shared):
    key = Trial(FakeTask(job), FakeMethod(job), job.seed).key
    return Reply("node7", "done", result=result_of(key), files=DONE)


class FakeTask:
    protocol = "subject"

    def __init__(self, job):
        self.subject = job.subject


class FakeMethod:
    def __init__(self, job):
        self.name = job.method


@pytest.fixture
def settings(world, tmp_path):
    """Four trials that share no images."""
    return runs.settings(world, tmp_path / "run", protocols=["subject"])


def kinds(folder, suffix):
    files = {name: data for name, data in read_files(folder).items() if name.endswith(suffix)}
    return {name: data for name, data in files.items() if "/report/" not in name}


def test_the_numbers_and_images_of_this_process(world, tmp_path, monkeypatch):
    """From relative paths, with images that trials share, each of which is generated once."""
    options = {"subjects": ["dog"], "methods": ["base", "lora-r4", "gralora-r4-k2"]}
    options |= {"with_prior_preservation": True, "num_class_images": 2, "sample_batch_size": 2}
    here = runs.settings(world, tmp_path / "here", **options)
    assert benchmark(here) == 0
    monkeypatch.chdir(world)
    options |= {"pretrained_model_name_or_path": "base", "dreambooth_dir": "dreambooth"}
    there = runs.settings(world, tmp_path / "there", **options)
    engine = Here()
    ledger, trials = drive(there, engine)
    assert ledger.left(trials) == ledger.failures() == []
    assert [job.method for job in engine.jobs if job.method] == ["base", "lora-r4", "gralora-r4-k2"]
    assert sorted(job.share for job in engine.jobs if job.share) == [
        "base/seed0/dog",
        "base/seed0/dog/a_dog",
        "class_pictures/a_dog",
    ]
    ours, theirs = (
        {r.key: (r.scores, r.prompts, r.settings, r.update_norm) for r in read_results(folder)[0]}
        for folder in (here.folder, there.folder)
    )
    assert ours == theirs
    for suffix in (".png", ".safetensors"):
        assert kinds(here.folder, suffix) == kinds(there.folder, suffix)
        assert kinds(there.folder, suffix)
    assert (there.folder / SETTINGS_NAME).is_file()


def test_what_is_lost_is_run_again_elsewhere(settings, caplog):
    lost = []

    def answer(job, shared):
        if job.subject == "dog" and len(lost) < ATTEMPTS - 1:
            lost.append(job)
            return Reply("node7", "lost", Failure("NodeDiedError: gone\nmore", ""))
        return done(job, shared)

    ledger, trials = drive(settings, Here(answer))
    assert ledger.left(trials) == ledger.failures() == []
    assert "subject, dog, lora-r4, seed 0: NodeDiedError: gone. It is run again" in caplog.text


def test_what_is_always_lost_or_fails_is_reported_and_the_rest_done(settings):
    def answer(job, shared):
        if job.subject == "dog":
            kind = "failed" if job.method == "lora-r4" else "lost"
            return Reply("node7", kind, Failure(f"ValueError: {job.method}", "where"))
        return done(job, shared)

    engine = Here(answer)
    ledger, trials = drive(settings, engine)
    assert ledger.left(trials) == []
    assert [failure.reason for failure in ledger.failures()] == [
        "the trial failed: ValueError: gralora-r4-k2",
        "the trial failed: ValueError: lora-r4",
    ]
    assert len(engine.jobs) == 2 + 1 + ATTEMPTS


def test_trials_fail_with_the_images_that_they_share(world, tmp_path):
    settings = runs.settings(world, tmp_path, protocols=["subject", "drift"])

    def answer(job, shared):
        if job.share == "base/seed0/dog":
            return Reply("node7", "failed", Failure("OutOfMemoryError: no", "where"))
        return done(job, shared) if job.method else Reply("node7", "done")

    ledger, trials = drive(settings, Here(answer))
    assert ledger.left(trials) == []
    assert [(f.path.parts[-4], f.reason) for f in ledger.failures()] == [
        ("dog", "the trial failed: OutOfMemoryError: no"),
        ("dog", "the trial failed: OutOfMemoryError: no"),
    ]


def test_a_machine_that_cannot_run_trials_ends_the_run(settings):
    problem = "torch is 1.0, but 2.0"
    with pytest.raises(ConfigError, match=f"node7: {problem}"):
        drive(settings, Here(lambda *_: Reply("node7", "refused", problems=(problem,))))
    assert not settings.folder.exists()


def test_full_disks_of_other_machines_end_the_run(settings):
    failure = Failure("OSError: [Errno 28] No space left on device", "")
    with pytest.raises(OSError, match=r"node7: OSError: .*No space left"):
        drive(settings, Here(lambda *_: Reply("node7", "disk", failure)))
    assert not settings.folder.exists()


def test_a_full_disk_here_leaves_nothing_half_written(settings):
    big = {"pictures/000_0.png": b"image", "pictures/000_1.png": bytes(100_000)}

    def answer(job, shared):
        reply = done(job, shared)
        return reply if job.subject == "cat2" else replace(reply, files=big)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            drive(settings, Here(answer))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    results, unreadable = read_results(settings.folder)
    assert {result.subject for result in results} == {"cat2"}
    assert unreadable == []
    assert not [p for p in settings.folder.rglob("*") if p.is_file() and "dog" in p.parts]
    engine = Here(done)  # the same command resumes
    drive(settings, engine)
    assert [job.subject for job in engine.jobs] == ["dog", "dog"]


def test_nothing_is_written_outside_of_a_trial(settings):
    def answer(job, shared):
        return replace(done(job, shared), files={"../../../../../../out": b"x"})

    ledger, trials = drive(settings, Here(answer))
    assert ledger.left(trials) == []
    assert all("is not a path within a folder" in f.reason for f in ledger.failures())
    assert not (settings.folder.parent / "out").exists()


@pytest.mark.parametrize("name", ["/etc/x", "..", "a/../../x", "", "a\\..\\b"])
def test_paths_that_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not a path within"):
        write_files({"good": b"", name: b""}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_versions_and_files_are_refused(settings, world, tmp_path):
    copy = tmp_path / "base"
    copy.mkdir()
    (copy / "model_index.json").write_text("{}")
    here = with_absolute_paths(settings)
    here.training = replace(here.training, pretrained_model_name_or_path=str(copy))
    required = requirements(here)
    assert node_problems(required) == []
    assert {place[0] for place in required.places} == {
        "--pretrained_model_name_or_path",
        "--dreambooth_dir",
        "--encoders dinov2",
        "--encoders clip",
    }
    older = replace(required, versions={**required.versions, "torch": "1.0"})
    (problem,) = node_problems(older)
    assert problem.startswith("torch is 2.")
    assert "but 1.0 where the benchmark was started" in problem
    (copy / "model_index.json").write_text("{} ")
    (problem,) = node_problems(required)
    assert problem.startswith(f"--pretrained_model_name_or_path: the files in '{copy}' differ")
    (copy / "model_index.json").unlink()
    copy.rmdir()
    (problem,) = node_problems(required)
    assert problem.startswith(f"--pretrained_model_name_or_path: there is no '{copy}'")


def test_other_images_are_refused(world, settings):
    """A machine that has the same folder, with another image in it."""
    jobs = []

    def answer(job, shared):
        jobs.append(job)
        return done(job, shared)

    drive(settings, Here(answer))
    reply = run_job(replace(jobs[0], digest="another"), {})
    assert (reply.kind, reply.node) == ("refused", node_name())
    assert reply.problems[0].startswith("the images or prompts of cat2 differ from those where")
