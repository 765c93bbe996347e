"""gossamer.nn.EmbeddingFolder: layers saved, shipped and followed together, through kills, gaps and broken files."""

import json
import os
import shutil

import pytest
import torch

from gossamer import optim
from gossamer.nn import DeltaGap, DynamicEmbedding, EmbeddingFolder, FrequencyAdmission, read_manifest

pytest.importorskip("safetensors")


def make(device, **changes):
    """Two layers that admit, evict and expire, of different shapes."""
    options = {"optimizer": optim.RowwiseAdagrad(lr=0.1), "expire_after": 5, "device": device} | changes
    return {
        "user": DynamicEmbedding(4, 60, seed=1, admission=FrequencyAdmission(2, capacity=200), **options),
        "item.id": DynamicEmbedding(3, 40, seed=2, **options),
    }


def train(layers, start, steps, device, other=0):
    """Steps that depend on their number alone, and on ``other``."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 * other + step)
        for layer in layers.values():
            layer.advance_clock(step)
            ids = (torch.randint(50, (6, 4), generator=generator) + 8 * step).to(device)
            layer(ids).square().sum().backward()
            layer.expire()


def beside(step):
    return {"weight": torch.full((2, 2), float(step)), "optimizer/0.exp_avg": torch.arange(step)}


def assert_same(first, second):
    """All state of the layers."""
    for name, layer in first.items():
        one, two = layer.get_extra_state(), second[name].get_extra_state()
        assert one["header"] == two["header"]
        for key, tensor in one["tensors"].items():
            assert torch.equal(tensor, two["tensors"][key]), (name, key)


def assert_serves(server, trainer):
    """The rows, and nothing else."""
    for name, layer in trainer.items():
        keys, values, _ = layer.table.export()
        assert len(server[name]) == keys.numel() > 0
        assert torch.equal(server[name].table.find(keys)[0], values)


def test_a_server_follows_and_a_killed_trainer_resumes(device, tmp_path):
    """Deltas bring the server to the trainer's rows; the resumed trainer writes the same files again, to the byte."""
    layers = make(device)
    folder = EmbeddingFolder(tmp_path / "a", layers)
    assert folder.load() is None and read_manifest(tmp_path / "a") is None and not (tmp_path / "a").exists()
    folder.save(beside(0), {"step": 0})
    server = EmbeddingFolder(tmp_path / "a", make(device))
    assert server.load().info == {"step": 0} and server.apply_next() is None
    for part in range(1, 5):
        train(layers, 3 * part, 3, device)
        rows = folder.export_delta(beside(part), {"step": part}, with_state=part == 2)
        if part == 2:
            train(layers, 40, 1, device)  # so that the checkpoint holds rows that no delta has yet
            folder.save(beside(40), {"step": [part, "late"]})
        got = server.apply_next()
        assert got.rows == rows > 0 and got.info == {"step": part} and server.apply_next() is None
        assert got.tensors.keys() == beside(part).keys()
        assert all(torch.equal(tensor, got.tensors[name]) for name, tensor in beside(part).items())
        if part != 2:
            assert_serves(server.layers, layers)
    assert layers["user"].counters.rejected and layers["item.id"].counters.expired
    assert read_manifest(tmp_path / "a")[:2] == (2, {"step": [2, "late"]})

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "delta-00000004.safetensors").unlink()
    (tmp_path / "b" / ".delta-00000004.safetensors.7.part").write_bytes(b"half")
    resumed = EmbeddingFolder(tmp_path / "b", make(device))
    got = resumed.load()
    assert got.info == {"step": [2, "late"]} and torch.equal(got.tensors["weight"], beside(40)["weight"])
    for part in (3, 4):
        train(resumed.layers, 3 * part, 3, device)
        resumed.export_delta(beside(part), {"step": part})
    assert_same(layers, resumed.layers)
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for one in (folder, resumed):
        one.save(beside(5), {})
    assert sorted(os.listdir(tmp_path / "b")) == [
        *(f"checkpoint-0000000{n}.safetensors" for n in (1, 2)),
        *(f"delta-0000000{n}.safetensors" for n in (3, 4)),
        "manifest.json",
    ]
    train(resumed.layers, 20, 2, device)
    resumed.export_delta()
    server.path = tmp_path / "b"
    assert server.apply_next().info == {} and server.sequence == 5
    assert_serves(server.layers, resumed.layers)


def test_gaps_are_told_and_a_checkpoint_leads_on(device, tmp_path):
    """A server that fell behind, and one that followed a run that was then repeated another way."""
    layers = make(device)
    folder = EmbeddingFolder(tmp_path, layers, keep=1)
    folder.save()
    late, astray, early = (EmbeddingFolder(tmp_path, make(device)) for _ in range(3))
    for server in (late, astray, early):
        server.load()
    train(layers, 0, 3, device)
    folder.export_delta()
    for server in (astray, early):
        server.apply_next()
    folder.save()
    with pytest.raises(DeltaGap, match=r"delta .*delta-00000001.safetensors is gone, .* checkpoint stands at number 1"):
        late.apply_next()
    late.load()
    assert late.sequence == 1 and late.apply_next() is None
    assert_serves(late.layers, layers)

    train(layers, 3, 3, device)
    folder.export_delta()
    astray.apply_next()
    again = EmbeddingFolder(tmp_path, make(device))
    again.load()
    for number in (2, 3):
        train(again.layers, 3 * number, 2, device, other=1)
        again.export_delta()
    before = {name: layer.get_extra_state()["tensors"]["table.values"] for name, layer in astray.layers.items()}
    with pytest.raises(DeltaGap, match=r"delta-00000003.safetensors does not follow the delta with number 2"):
        astray.apply_next()
    for name, layer in astray.layers.items():
        assert torch.equal(layer.get_extra_state()["tensors"]["table.values"], before[name])
    astray.load()
    for server in (astray, early):
        while server.apply_next():
            pass
        assert server.sequence == 3
        assert_serves(server.layers, again.layers)


def test_a_broken_delta_changes_no_layer(device, tmp_path):
    """Truncated, flipped, without room or of other layers: an error that names it, and a later checkpoint helps."""
    layers = make(device)
    folder = EmbeddingFolder(tmp_path, layers)
    folder.save()
    server, reference = (EmbeddingFolder(tmp_path, make(device)) for _ in range(2))
    server.load()
    reference.load()
    train(layers, 0, 6, device)
    folder.export_delta({"w": torch.ones(3)})
    path = tmp_path / "delta-00000001.safetensors"
    good = path.read_bytes()
    flips = [len(good) // 2, len(good) - 1, good.index(b"user/values") - 9]
    # A digit of the number of the second layer: what is in the header counts too.
    flips.append(good.index(b'\\"sequence\\": 1', good.index(b'\\"item.id\\"')) + 15)
    for data in [good[:0], good[: len(good) // 3], good[:-1]] + [
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in flips
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"delta-00000001.safetensors is (truncated or corrupt|corrupt)"):
            server.apply_next()
    assert_same(server.layers, reference.layers)
    path.write_bytes(good)
    small = EmbeddingFolder(tmp_path, make(device) | {"item.id": DynamicEmbedding(3, 5, evict=None, device=device)})
    small.lineage = server.lineage
    with pytest.raises(ValueError, match=r"delta .*, layer 'item.id' holds \d+ new rows for 5 free ones"):
        small.apply_next()
    assert len(small.layers["user"]) == 0 == small.sequence
    with pytest.raises(ValueError, match=r"is of the layers \['item.id', 'user'\], but these are \['user'\]"):
        EmbeddingFolder(tmp_path, {"user": layers["user"]}).load()
    other = EmbeddingFolder(tmp_path, make(device, optimizer=optim.Adam()))
    with pytest.raises(ValueError, match=r"checkpoint .*, layer 'user' is of optimizer='RowwiseAdagrad', but"):
        other.load()
    path.write_bytes(good[:-1])
    folder.save({"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="truncated"):
        server.apply_next()
    assert read_manifest(tmp_path).sequence == 1 > server.sequence
    assert server.load().rows == sum(map(len, layers.values()))
    assert_same(server.layers, layers)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_save_that_stops_half_way_leaves_the_one_before(device, tmp_path, monkeypatch, fails_at):
    """The save stops while it writes the checkpoint or, after that, the manifest."""
    layers = make(device)
    folder = EmbeddingFolder(tmp_path, layers)
    train(layers, 0, 3, device)
    folder.save(beside(3), {"step": 3})
    folder.export_delta()
    saved = EmbeddingFolder(tmp_path, make(device))
    saved.load()
    train(layers, 3, 3, device)
    replace, calls = os.replace, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space left"):
            folder.save(beside(6), {"step": 6})
    resumed = EmbeddingFolder(tmp_path, make(device))
    assert resumed.load().info == {"step": 3}
    assert_same(resumed.layers, saved.layers)
    assert resumed.apply_next().rows == sum(map(len, saved.layers.values()))
    folder.save(beside(6), {"step": 6})
    assert resumed.load().info == {"step": 6}
    assert_same(resumed.layers, layers)


def test_bad_arguments_and_manifests(device, tmp_path):
    layers = make(device)
    for given, error, message in [
        ({"layers": {"a/b": layers["user"]}}, ValueError, "must not hold '/', got 'a/b'"),
        ({"layers": {"a": torch.nn.Linear(1, 1)}}, TypeError, r"layers\['a'\] must be a DynamicEmbedding, got Linear"),
        ({"layers": {"a": layers["user"], "b": layers["user"]}}, ValueError, "layers must be distinct"),
        ({"layers": layers, "keep": 0}, ValueError, "keep must be at least 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            EmbeddingFolder(tmp_path, **given)
    folder = EmbeddingFolder(tmp_path, layers)
    with pytest.raises(ValueError, match="deltas follow a checkpoint"):
        folder.export_delta()
    with pytest.raises(TypeError, match="not JSON serializable"):
        folder.save(info={"step": torch.ones(1)})
    for text in ("{", "[]", json.dumps({"format": 1, "checkpoints": []}), "\xff"):
        (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"manifest.json is not a manifest of a gossamer.nn.EmbeddingFolder"):
            folder.load()
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match=r"manifest.json is of format=2, but this layer has format=1"):
        folder.load()


def test_a_corrupt_newest_checkpoint_points_to_the_one_before(device, tmp_path):
    """The one before can be loaded, trained from and saved over, which drops the corrupt one."""
    layers = make(device)
    folder = EmbeddingFolder(tmp_path, layers)
    train(layers, 0, 3, device)
    folder.save(beside(3), {"step": 3})
    older = EmbeddingFolder(tmp_path, make(device))
    older.load()
    train(layers, 3, 3, device)
    folder.export_delta()
    folder.save(beside(6), {"step": 6})
    newest = tmp_path / "checkpoint-00000001.safetensors"
    data = newest.read_bytes()
    resumed = EmbeddingFolder(tmp_path, make(device))
    for broken in (data[:-1], data[: len(data) // 2], b""):
        newest.write_bytes(broken)
        message = r"checkpoint-00000001.* is (truncated or )?corrupt.*: load\(older=1\)"
        with pytest.raises(ValueError, match=message) as caught:
            resumed.load()
        assert "the checkpoint before it is checkpoint-00000000.safetensors at number 0" in str(caught.value)
    newest.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*00000001.*: load\(older=1\)"):
        resumed.load()
    newest.write_bytes(data[:-1])
    assert resumed.load(older=1).info == {"step": 3}
    assert_same(resumed.layers, older.layers)
    # The delta after it leads to what the corrupt checkpoint held.
    assert resumed.apply_next() is not None
    assert_serves(resumed.layers, layers)
    for wrong, message in ((2, "older must be below 2, the checkpoints kept, got 2"), (-1, "at least 0, got -1")):
        with pytest.raises(ValueError, match=message):
            resumed.load(older=wrong)
    again = EmbeddingFolder(tmp_path, make(device))
    again.load(older=1)
    train(again.layers, 3, 3, device)
    again.export_delta()
    again.save(beside(6), {"step": 6})
    assert [name for name, _ in read_manifest(tmp_path).checkpoints] == [
        "checkpoint-00000002.safetensors",
        "checkpoint-00000000.safetensors",
    ]
    assert not newest.exists()
    assert_same(again.layers, layers)


def test_the_only_checkpoint_is_corrupt(device, tmp_path):
    folder = EmbeddingFolder(tmp_path, make(device), keep=1)
    folder.save()
    (tmp_path / "checkpoint-00000000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="corrupt") as caught:
        folder.load()
    assert "older" not in str(caught.value)


def test_checkpoints_without_a_manifest_are_no_fresh_start(device, tmp_path):
    layers = make(device)
    folder = EmbeddingFolder(tmp_path, layers)
    folder.save()
    folder.save()
    (tmp_path / "manifest.json").unlink()
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = r"holds 2 checkpoints, such as checkpoint-00000001.safetensors, and no manifest.json: restore it, or move"
    for call in (folder.load, folder.save, EmbeddingFolder(tmp_path, make(device)).load):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held


def test_a_first_save_that_stops_half_way_is_a_fresh_start(device, tmp_path, monkeypatch):
    """Before the first manifest names a checkpoint, there is none, whatever lies there."""
    replace = os.replace

    def failing(source, target):
        if (tmp_path / "checkpoint-00000000.safetensors").exists():
            raise OSError("no space left on device")
        replace(source, target)

    folder = EmbeddingFolder(tmp_path, make(device))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space left"):
            folder.save()
    assert (tmp_path / "checkpoint-00000000.safetensors").exists()
    assert read_manifest(tmp_path) is None and folder.load() is None
    folder.save(info={"step": 0})
    assert EmbeddingFolder(tmp_path, make(device)).load().info == {"step": 0}
