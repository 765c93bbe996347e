"""MovieLens as clicks: a hand-made folder in its format, files that do not fit, and the study."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from gossamer.bench.harness import study
from gossamer.bench.studies import movielens_budget
from gossamer.bench.studies.movielens import MovieLens
from gossamer.cli import app

ITEMS = {"7": "Drama", "9": "Action War", "40": "Drama War Comedy Horror"}
USERS = {"3": "55105", "5": "V0R2M", "8": "55105"}
RATINGS = [("3", "7", 4), ("3", "9", 3), ("5", "40", 5), ("8", "7", 1), ("8", "40", 2), ("5", "9", 4)]


def write(folder, items=ITEMS, users=USERS, ratings=RATINGS):
    """The three files, with the columns that the real ones have."""
    folder.mkdir(exist_ok=True)

    def lines(name, head, rows):
        text = "\n".join("\t".join(map(str, row)) for row in [head, *rows]) + "\n"
        (folder / f"ml-100k.{name}").write_text(text, encoding="utf-8")

    lines("inter", ["user_id:token", "item_id:token", "rating:float", "timestamp:float"], [(*r, 88) for r in ratings])
    head = ["item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"]
    lines("item", head, [(item, 'Ça "va', 1995, kinds) for item, kinds in items.items()])
    head = ["user_id:token", "age:token", "gender:token", "occupation:token", "zip_code:token"]
    lines("user", head, [(user, 24, "F", "other", code) for user, code in users.items()])
    return folder


def test_every_rating_is_in_one_part(tmp_path):
    source = MovieLens(write(tmp_path))
    assert source.rows == {"user": 3, "item": 3, "zip": 2, "kinds": 5}
    kept = list(source.validation(10, 4))
    trained = list(source.training(3, 1, 5))
    rows = []
    for batch in kept + trained:
        for place, click in enumerate(batch.clicks):
            user, item = int(batch.ids["user"][place]), int(batch.ids["item"][place])
            # Numbers are in the order of the files of users and items.
            rows.append((list(USERS)[user], list(ITEMS)[item], bool(click)))
            assert batch.ids["zip"][place].tolist() == [[0], [1], [0]][user]
            assert batch.ids["kinds"][place].tolist() == [[0, 0, 0], [1, 2, 1], [0, 2, 3]][item]
    assert sorted(rows) == sorted((user, item, rating >= 4) for user, item, rating in RATINGS)
    assert sum(len(batch.clicks) for batch in kept) == 1
    again = MovieLens(tmp_path)
    assert torch.equal(next(again.training(3, 1, 5)).ids["user"], trained[0].ids["user"])
    orders = {tuple(next(again.training(seed, 1, 5)).ids["user"].flatten().tolist()) for seed in range(8)}
    assert len(orders) > 1 and torch.equal(next(again.validation(1, 4)).ids["user"], kept[0].ids["user"])


def change(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("inter", "rating:float", "stars:float", "inter must have each of the columns .* once, got 0 of rating:float"),
        ("inter", "3\t7\t4", "4\t7\t4", "line 2: must name a known user and item, got '4' and '7'"),
        ("inter", "3\t9\t3", "3\t9\tnan", "line 3: rating must be from 1 to 5, got 'nan'"),
        ("inter", "3\t9\t3", "3\t9\tfour", "line 3: rating must be from 1 to 5, got 'four'"),
        ("inter", "3\t9\t3", "3\t9", "line 3: must have 4 columns, got 3"),
        ("item", "9\tÇa", "7\tÇa", "line 3: must name a new item and its classes, got '7'"),
        ("item", "Action War", " ", "line 3: must name a new item and its classes, got '9', ' '"),
        ("user", "5\t24", "3\t24", "line 3: must name a new user, got '3' again"),
    ],
)
def test_files_that_are_not_what_they_must_be(tmp_path, name, old, new, said):
    change(write(tmp_path) / f"ml-100k.{name}", old, new)
    with pytest.raises(ValueError, match=said):
        MovieLens(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path)
    (tmp_path / "ml-100k.item").write_bytes(b"item_id:token\tclass:token_seq\n1\t\xff\xfe\n")
    with pytest.raises(ValueError, match="item must be UTF-8"):
        MovieLens(tmp_path)
    with (tmp_path / "ml-100k.item").open("r+b") as file:
        file.truncate(33 << 20)
    with pytest.raises(ValueError, match="item must be at most 33554432 bytes, got 34603008"):
        MovieLens(tmp_path)
    with pytest.raises(ValueError, match="must hold at least 5 ratings, got 2"):
        MovieLens(write(tmp_path / "few", ratings=RATINGS[:2]))


def test_who_gives_no_folder_is_told_how_to_get_it(tmp_path):
    for extra in ([], ["--data", str(tmp_path)]):
        said = CliRunner().invoke(app, ["bench", "study", "movielens_budget", *extra])
        assert said.exit_code == 2 and "pip download --no-deps recbole==1.2.1" in said.output
    said = CliRunner().invoke(app, ["bench", "study", "embedding_budget", "--data", str(tmp_path)])
    assert said.exit_code == 2 and "--data must not be given with study embedding_budget" in said.output


def test_cases_meet_their_budget_on_ratings(tmp_path):
    """The table of kinds is too small to be compressed and counts in full; what is stored names no folder."""
    users, items = ({str(n): words for n in range(70 + 5 * k)} for k, words in enumerate(("1", "Drama War")))
    ratings = [(user, item, 1 + (int(user) * int(item)) % 5) for user in users for item in items]
    folder = write(tmp_path, items, users, ratings)
    chosen = movielens_budget.STUDY
    settings = dataclasses.replace(chosen.settings["quick"], steps=6, eval_batches=2, budgets=(0.5,))
    chosen = dataclasses.replace(chosen, settings={"quick": settings})
    cases = [case for case in chosen.cases() if case.name in ("dense", "hash", "clustered")]
    loaded = study.loaded(chosen, "quick", folder)
    record = study.run(chosen, cases, effort="quick", seeds=1, settings=loaded)
    assert not record["left_out"] and record["settings"]["source"] is None
    dense, *rest = (case["runs"][0] for case in record["cases"])
    assert dense["points"]["all"]["share"] == 1
    assert len(rest) == 2 and all(0.3 < run["points"]["0.5"]["share"] <= 0.5 for run in rest)
