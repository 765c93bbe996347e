"""The example that learns clicks online: it learns, survives SIGKILL to the bit, and its server follows it."""

from __future__ import annotations

import importlib
import json
import random
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from gossamer.nn import EmbeddingFolder, read_manifest
from gossamer.nn.embeddings import files

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "--batch": 256, "--dim": 8, "--capacity": 1200, "--threshold": 2, "--expire-after": 15, "--size": 0.05, "--pace": 8,
    "--steps": 90, "--delta-every": 5, "--checkpoint-every": 20, "--patience": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def example():
    """The example's modules."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        names = ("click_stream", "ctr_model", "ctr_server", "ctr_report", "online_ctr")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(out, *more, **changed):
    """The command line of a tiny run."""
    settings = TINY | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return ["--out", str(out), *(str(part) for pair in settings.items() for part in pair), *more]


def trainer(example, out, device, **changed):
    """A trainer that has begun its folder."""
    _, settings = example.online_ctr.parse_arguments(arguments(out, "--device", device, **changed))
    made = example.ctr_model.Trainer(settings)
    return made, EmbeddingFolder(out, made.dynamic)


def info(made):
    return {"step": made.step, "steps": 10**6, "delta_every": 5, "settings": vars(made.settings), "seconds": 0.0}


def train(made, folder, steps):
    """Steps, and the delta after them."""
    for _ in range(steps):
        made.train_step()
    folder.export_delta(made.serving_tensors(), info(made))


def test_the_stream_is_a_function_of_seed_and_step_and_drifts(example):
    stream = example.click_stream.ClickStream(3, 2000, size=0.1)
    one, two = stream.events(7), example.click_stream.ClickStream(3, 2000, size=0.1).events(7)
    others = [stream.events(8), stream.events(7, 1), example.click_stream.ClickStream(4, 2000, size=0.1).events(7)]
    assert torch.equal(one.dense, two.dense) and torch.equal(one.clicks, two.clicks)
    for name, (ids, offsets) in one.ids.items():
        assert torch.equal(ids, two.ids[name][0]) and torch.equal(offsets, two.ids[name][1])
        assert offsets[0] == 0 and offsets[-1] == ids.numel() and (offsets.diff() >= 0).all()
        assert not any(torch.equal(ids, other.ids[name][0]) for other in others)
        # A power law: the tenth of ids that are most frequent have far more than a tenth of the events.
        counts = ids.unique(return_counts=True)[1].sort(descending=True).values
        assert counts[: len(counts) // 10].sum() > 0.2 * ids.numel()
    items = {step: stream.events(step).ids["item"][0] for step in (7, 8, 60, 2000)}
    shared = [torch.isin(items[step], items[7]).float().mean() for step in (8, 60, 2000)]
    assert shared[0] > 0.7 and 0.3 < shared[1] < shared[0] - 0.05 and shared[2] == 0
    assert not torch.isin(others[2].ids["item"][0], items[7]).any()
    assert torch.isin(others[1].ids["item"][0], items[7]).float().mean() > 0.7
    # Clicks come from the hidden logits: their mean over many events is that of the probabilities.
    chance = one.truth.sigmoid()
    assert abs(one.clicks.double().mean() - chance.mean()) < 4 * (chance * (1 - chance)).mean() ** 0.5 / 2000**0.5


def test_hidden_numbers_are_nearly_normal_and_independent(example):
    import numpy as np

    numbers = np.stack([example.click_stream.normal(np.arange(20_000, dtype=np.uint64), salt) for salt in range(3)])
    assert (abs(numbers.mean(1)) < 0.03).all() and (abs(np.cov(numbers) - np.eye(3)) < 0.03).all()
    assert 0.31 < (numbers > 0.5).mean() < 0.315  # 0.3085 for normal ones; sums of four are a little flatter


def test_auc_counts_pairs(example):
    scores, clicks = torch.randint(6, (80,)).float(), torch.randint(2, (80,)).float()
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[clicks == 1] for b in scores[clicks == 0]]
    assert example.ctr_model.auc(scores, clicks) == pytest.approx(sum(wins) / len(wins), rel=1e-12)
    assert example.ctr_model.auc(scores, torch.ones(80)) == 0.5


def test_learning_ids_pays_and_collisions_cost(example, device):
    """Better than the click rate, worse than the hidden numbers; as many bytes of fixed tables do less well."""
    results = {}
    for tables in ("dynamic", "hashing"):
        # Ids that live 5 to 60 steps: fixed tables fill up with dead ones.
        made, _ = trainer(example, "unused", device, tables=tables, size=0.03, pace=24, capacity=900, expire_after=12)
        for _ in range(240):
            made.train_step()
        results[tables] = made.recent(60) | {"bytes": made.table_bytes}
    ours, theirs = results["dynamic"], results["hashing"]
    assert ours["bytes"] == pytest.approx(theirs["bytes"], rel=1e-3)
    rate = torch.tensor(ours["clicks"])
    assert 0.64 < ours["auc"] < ours["ceiling"] - 0.05
    assert ours["logloss"] < float(torch.special.entr(rate) + torch.special.entr(1 - rate)) - 0.02
    assert ours["auc"] > theirs["auc"] + 0.015 and ours["logloss"] < theirs["logloss"]
    assert min(ours["inserted"], ours["expired"], ours["rejected"]) > 0 and ours["rows"] <= 900


def test_the_memory_of_a_table_is_counted(example, device):
    """The count equals the bytes of the table's and the filter's arrays, up to the slots that fill the last bucket."""
    made, _ = trainer(example, "unused", device, capacity=12_000)
    for table in made.dynamic.values():
        storages = (table.table._storage, table._filter.seen._storage)
        held = [t for s in storages for t in vars(s).values() if t is not None]
        held += [table._last_used, table._changed, *table.optimizer_state.values()]
        assert example.ctr_model.table_bytes(table) == pytest.approx(sum(t.nbytes for t in held), rel=0.005)


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.args
        time.sleep(0.002)


def kill_and_resume(example, out, command):
    """Kill the run three times, then let it end."""
    moments, chance = (None, 6, 13), random.Random(0)
    for number in moments:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            if number is None:
                wait_for((out / "dynamic").exists, process)
            else:
                wait_for((out / "dynamic" / f"delta-{number:08d}.safetensors").exists, process)
                time.sleep(chance.uniform(0, 0.05))
            assert process.poll() is None
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert read_manifest(out / "dynamic").info["step"] < 90
    assert example.online_ctr.main(arguments(out)) == 0


def test_a_killed_run_ends_with_the_same_bits(example, tmp_path):
    """SIGKILL in the first save and at two moments later: tables, dense weights, optimizer and files are the same.

    A server follows all along, and does not notice.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert example.online_ctr.main(arguments(whole)) == 0
    command = [sys.executable, str(EXAMPLES / "online_ctr.py"), *arguments(broken)]
    serve = [sys.executable, command[1], "--serve", str(broken / "dynamic"), "--patience", "40"]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        kill_and_resume(example, broken, command)
        output, _ = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    served = json.loads((broken / "dynamic" / "serving.json").read_text())
    assert server.returncode == 0 and served["step"] == 90, output
    assert served["deltas_applied"] > 0 == served["deltas_refused"], output
    manifests = [read_manifest(folder / "dynamic") for folder in (whole, broken)]
    assert manifests[0].sequence == manifests[1].sequence == 18 and manifests[1].info["step"] == 90
    (one, first), (two, second) = (
        files.read(folder / "dynamic" / manifest.checkpoints[0][0], "joint checkpoint")
        for folder, manifest in zip((whole, broken), manifests, strict=True)
    )
    assert one.keys() == two.keys() and len(one) > 60
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert first["lineage"] == second["lineage"] and first["layers"] == second["layers"]
    deltas = sorted(path.name for path in (whole / "dynamic").glob("delta-*"))
    assert deltas[-1] == "delta-00000018.safetensors"
    for name in deltas:
        assert (whole / "dynamic" / name).read_bytes() == (broken / "dynamic" / name).read_bytes()
    assert not list((broken / "dynamic").glob(".*"))


def test_the_server_scores_as_the_trainer_and_refuses_what_is_broken(example, tmp_path, device):
    made, folder = trainer(example, tmp_path, device)
    folder.save(made.tensors(), info(made))
    lines = []
    server = example.ctr_server.Server(tmp_path, lines.append)

    def assert_equal_scores():
        for step in (made.step, made.step + 40):
            events = made.stream.events(step, example.click_stream.HELD_OUT)
            assert torch.equal(server.model.score(events), made.score(events))

    for _ in range(3):
        train(made, folder, 8)
        assert server.apply_next() and not server.apply_next()
        assert_equal_scores()
    server.answer()
    events = made.stream.events(made.step, example.click_stream.HELD_OUT)
    assert server.aucs[0] == [example.ctr_model.auc(made.score(events).cpu(), events.clicks)]
    assert made.recent(1)["expired"] > 0

    before, at = server.model.score(events), made.step
    train(made, folder, 8)
    path = tmp_path / "delta-00000004.safetensors"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(broken)
        for _ in range(2):
            assert not server.apply_next()
        assert torch.equal(server.model.score(events), before)
        assert re.fullmatch(
            rf"refused, still serving step {at}: .*delta-00000004.safetensors is (truncated or )?corrupt: .*", lines[-1]
        )
    assert server.refused == 2 and sum("refused" in line for line in lines) == 2
    train(made, folder, 8)
    assert not server.apply_next() and server.folder.sequence == 3
    path.write_bytes(whole)
    assert server.apply_next() and server.apply_next()
    assert_equal_scores()
    before = server.model.score(events)
    train(made, folder, 3)
    (tmp_path / "delta-00000006.safetensors").write_bytes(whole)
    while server.apply_next():
        pass
    assert server.folder.sequence == 5 and torch.equal(server.model.score(events), before)
    assert "delta-00000006.safetensors does not follow the delta with number 5" in lines[-2]
    assert "loaded the checkpoint" in lines[-1]
    folder.save(made.tensors(), info(made))
    assert server.apply_next() and server.folder.sequence == 6
    assert_equal_scores()


def test_a_run_with_a_server_beside_it_and_all_kinds_of_tables(example, tmp_path, capsys, device):
    assert example.online_ctr.main(arguments(tmp_path, "--compare", "--with-server", "--device", device, steps=40)) == 0
    out = capsys.readouterr().out
    assert max(map(len, out[out.index("The last") :].splitlines())) <= 80 or str(tmp_path) in out.splitlines()[-1]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [run["settings"]["tables"] for run in metrics["runs"]] == ["dynamic", "unfiltered", "hashing"]
    for run in metrics["runs"]:
        assert run["steps"] == 40 == len(run["by_step"]["auc"]) and f"{run['tail']['auc']:.4f}" in out
    assert not any(metrics["runs"][1]["by_step"]["rejected"]) and any(metrics["runs"][0]["by_step"]["rejected"])
    served = metrics["served"]
    assert served["step"] == 40 and served["deltas_refused"] == 0
    # The last it served is what the trainer ended with, and what it measured is that model's AUC.
    made, folder = trainer(example, tmp_path / "dynamic", device)
    made.take(folder.load().tensors, 40)
    events = made.stream.events(40, example.click_stream.HELD_OUT)
    score = example.ctr_model.auc(made.score(events), events.clicks)
    lines = [line for line in (tmp_path / "server.log").read_text().splitlines() if line.startswith("step 40: delta")]
    assert f"0: {score:.4f}, 5: " in lines[-1]
    for name in ("auc.png", "tables.png"):
        head = (tmp_path / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:24])) > 500
    # A finished run is shown again, not trained again, and cannot be continued with other settings.
    before = (tmp_path / "dynamic" / "manifest.json").read_bytes()
    assert example.online_ctr.main(arguments(tmp_path, "--device", device, steps=40)) == 0
    assert (tmp_path / "dynamic" / "manifest.json").read_bytes() == before
    assert example.online_ctr.main(arguments(tmp_path, "--device", device, steps=40, threshold=5)) == 2
    assert "holds a run with --threshold 2, not 5" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_have_the_curve_of_one(example, tmp_path):
    """A run is sharded over the processes of torchrun, followed by a server, and continued by one process."""
    settings = {"steps": 30, "capacity": 4000, "checkpoint_every": 10}
    assert example.online_ctr.main(arguments(tmp_path / "one", **settings | {"steps": 35})) == 0

    def launch(processes, *more, **changed):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        line = arguments(tmp_path / "many", "--shard", "row", "--device", "cpu", *more, **settings | changed)
        done = subprocess.run(
            [*command, EXAMPLES / "online_ctr.py", *line], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    said = launch(2, "--with-server")
    # One process alone says how far they are.
    assert said.count("dynamic, step 30: AUC") == 1 and said.count("A step of process 0 of 2") == 1
    launch(1, steps=35)
    assert sorted(path.name for path in (tmp_path / "many" / "dynamic").glob("*-of-*")) == ["0-of-1"]
    one, many = (json.loads((tmp_path / name / "metrics.json").read_text())["runs"][0] for name in ("one", "many"))
    for name in ("ceiling", "clicks", "rows", "inserted", "evicted", "expired", "rejected"):
        assert one["by_step"][name] == many["by_step"][name], name
    assert not any(one["by_step"]["evicted"]) and any(one["by_step"]["expired"])
    for name in ("auc", "logloss"):
        assert many["by_step"][name] == pytest.approx(one["by_step"][name], rel=1e-3), name
    served = json.loads((tmp_path / "many" / "dynamic" / "serving.json").read_text())
    assert served["step"] == 30 and served["deltas_refused"] == 0


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"batch": 0}, [], "--batch must be at least 1, got 0"),
        ({"lr": "nan"}, [], "--lr must be above 0 and finite, got nan"),
        ({"pace": 0}, [], "--pace must be above 0 and finite, got 0.0"),
        ({"patience": -1}, [], "--patience must be at least 0 and finite, got -1"),
        ({"tables": "cuckoo"}, [], "invalid choice: 'cuckoo'"),
        ({"tables": "hashing"}, ["--with-server"], "--with-server needs dynamic tables"),
        ({}, ["--serve", "x"], "argument --serve: not allowed with argument --out"),
        ({}, ["--shard"], "--shard needs the processes of torchrun"),
        ({}, ["--shard", "column"], "argument --shard: invalid choice: 'column'"),
    ],
)
def test_bad_arguments_are_named(example, changed, more, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        example.online_ctr.main(arguments(tmp_path / "out", *more, **changed))
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_server_without_a_trainer_says_so(example, tmp_path, capsys):
    assert example.online_ctr.main(["--serve", str(tmp_path / "none"), "--patience", "0.2"]) == 2
    assert "none holds no checkpoint" in capsys.readouterr().out
