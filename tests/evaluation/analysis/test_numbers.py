"""Every number of the report against slow loops over pieces that the models saw one at a time."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.evaluation.analysis.content_types import PAPER, TYPES, passages
from dlcm_lightning.evaluation.analysis.text_units import units_of
from dlcm_lightning.export.portable import model_of, open_trained
from dlcm_lightning.training.evaluate import evaluate
from tests.evaluation.analysis.conftest import Analysed, Piece, answer_of, close, quiet

CPU = torch.float32, torch.device("cpu")


def clustered(terms: list[tuple[float, float, int]]) -> tuple[float, float | None]:
    """terms: over, under, document. The ratio and its error, by loops."""
    over, under = sum(one for one, _, _ in terms), sum(one for _, one, _ in terms)
    ratio, residuals = over / under, defaultdict[int, float](float)
    for one, weight, document in terms:
        residuals[document] += one - ratio * weight
    count = len(residuals)
    if count < 2:
        return ratio, None
    variance = count / (count - 1) * sum(one**2 for one in residuals.values()) / under**2
    return ratio, math.sqrt(variance)


def test_the_rows_are_those_of_the_run(report: Analysed, pieces: list[Piece]) -> None:
    rows = report.found["rows"]
    assert rows["tokens"] == sum(len(piece.ids) for piece in pieces) == rows["rows"] * rows["sequence_length"]
    assert rows["pieces"] == len(pieces) and rows["documents"] == pieces[-1].document + 1
    assert rows["documents"] < rows["pieces"]  # some go on in the next row
    assert rows["domains"] == ["en", "zh"]


def test_bits_per_byte_is_that_of_evaluate_to_nine_digits(report: Analysed, run: Path, dense_run: Path) -> None:
    found = report.found["bits_per_byte"]
    for place, name in ((run, "bits_per_byte"), (dense_run, "other_bits_per_byte")):
        stated = evaluate(place, None, [], quiet)
        assert found["all"][name] == pytest.approx(stated["bits_per_byte"], rel=1e-9)
        for domain, one in found["domains"].items():
            assert one[name] == pytest.approx(stated["domains"][domain]["bits_per_byte"], rel=1e-9)
    stated = evaluate(run, None, [], quiet)
    assert found["all"]["loss"] == pytest.approx(stated["loss"], rel=1e-9)
    lengths = report.found["concept_lengths"]
    assert lengths["all"]["tokens_per_concept"] == pytest.approx(stated["R_thresholded"], rel=1e-9)
    for domain, one in lengths["domains"].items():
        assert one["tokens_per_concept"] == pytest.approx(stated["domains"][domain]["R_thresholded"], rel=1e-9)


def test_bits_per_byte_by_domain_and_tokens_seen(report: Analysed, pieces: list[Piece], tokenizer: Tokenizer) -> None:
    found, sizes = report.found["bits_per_byte"], tokenizer.token_bytes()
    terms = defaultdict[Any, list[tuple[float, float, int]]](list)
    gaps = defaultdict[Any, list[tuple[float, float, int]]](list)
    for piece in pieces:
        for place, target in enumerate(piece.targets):
            if target < 0:
                continue
            under = int(sizes[target]) * math.log(2)
            for key in ("all", piece.domain, (place + 1).bit_length() - 1):
                terms[key].append((piece.nll[place], under, piece.document))
                gaps[key].append((piece.nll[place] - piece.other[place], under, piece.document))
    stated = {"all": found["all"], **found["domains"], **dict(enumerate(found["by_tokens_seen"]))}
    assert set(stated) == set(terms)
    for key, one in stated.items():
        ratio, error = clustered(terms[key])
        assert close(one["bits_per_byte"], ratio) and close(one["error"], error, 1e-3), key
        gap, gap_error = clustered(gaps[key])
        assert one["difference"] == pytest.approx(gap, abs=1e-5) and close(one["difference_error"], gap_error, 1e-2)
        assert one["predicted_tokens"] == len(terms[key])
        assert one["documents"] == len({document for _, _, document in terms[key]})
    seen = found["by_tokens_seen"]
    assert [(one["from"], one["to"]) for one in seen] == [(2**n, 2**(n + 1) - 1) for n in range(len(seen))]


def test_loss_by_position_counts_from_the_boundary_that_closed_the_last_concept(report: Analysed, pieces: list[Piece]
                                                                                ) -> None:
    found, own, gaps = report.found["loss_by_position"], defaultdict[int, list[Any]](list), defaultdict[int, list[Any]](
        list)
    for piece in pieces:
        after = 0
        for place, target in enumerate(piece.targets):
            after = 0 if piece.b[place] else after + 1
            if target >= 0:
                own[min(after, 16)].append((piece.nll[place], 1, piece.document))
                gaps[min(after, 16)].append((piece.nll[place] - piece.other[place], 1, piece.document))
    assert [one["position"] for one in found["positions"]] == sorted(own)
    assert len(own) > 5
    for one in found["positions"]:
        terms = own[one["position"]]
        assert one["tokens"] == len(terms) and one["documents"] == len({document for _, _, document in terms})
        assert close(one["loss"], clustered(terms)[0]) and close(one["error"], clustered(terms)[1], 1e-3)
        gap, error = clustered(gaps[one["position"]])
        assert one["difference"] == pytest.approx(gap, abs=1e-5) and close(one["difference_error"], error, 1e-2)


def test_lengths_are_those_of_the_pooled_tokens(report: Analysed, pieces: list[Piece]) -> None:
    by_domain = defaultdict[str, list[int]](list)
    for piece in pieces:
        length = 0
        for place, closes in enumerate(piece.b):
            length += 1
            if closes:
                if place:
                    by_domain[piece.domain].append(length)
                    by_domain["all"].append(length)
                length = 0
    found = report.found["concept_lengths"]
    for domain, one in {**found["domains"], "all": found["all"]}.items():
        lengths = by_domain[domain]
        assert one["counts"] == [lengths.count(n) for n in range(1, 33)] + [sum(n > 32 for n in lengths)]
        assert one["concepts"] == len(lengths) and close(one["mean"], sum(lengths) / len(lengths))
        assert one["median"] == statistics.median_low(lengths)
        assert one["tenth"] <= one["median"] <= one["ninetieth"]
    assert found["all"]["boundaries"] == sum(sum(piece.b) for piece in pieces)


def test_alignment_by_loops_over_tokens_and_bytes(report: Analysed, pieces: list[Piece], tokenizer: Tokenizer) -> None:
    sums = defaultdict[Any, list[float]](lambda: [0, 0, 0, 0, 0.0])
    for piece in pieces:
        spelled = tokenizer.pieces(piece.ids)
        units = units_of(b"".join(spelled), piece.ids[-1] == tokenizer.eos_id)
        for kind, one in units.items():
            for convention, places in (("last", one.last), ("next", one.next)):
                begin, tokens, boundaries, aligned, hits = 0, 0, 0, 0, 0
                for place, text in enumerate(spelled):
                    holds = any(begin <= at < begin + len(text) for at in places)
                    begin += len(text)
                    if place == 0 or not text:
                        continue
                    tokens += 1
                    boundaries += piece.b[place]
                    aligned += holds
                    hits += holds and piece.b[place]
                for domain in ("all", piece.domain):
                    chance = boundaries * aligned / tokens if tokens else 0
                    for column, value in enumerate((tokens, boundaries, aligned, hits, chance)):
                        sums[domain, kind, convention][column] += value
    assert sums["all", "words", "last"][3] > 10
    for domain, kinds in report.found["alignment"]["domains"].items():
        for kind, by_convention in kinds.items():
            for convention in ("last", "next"):
                one, (tokens, boundaries, aligned, hits, chance) = by_convention[convention], sums[
                    domain, kind, convention]
                assert [one["tokens"], one["boundaries"], one["units"], one["hits"]] == [tokens, boundaries, aligned,
                                                                                        hits]
                assert close(one["precision"], hits / boundaries)
                assert close(one["recall"], hits / aligned if aligned else None)
                assert close(one["f1"], 2 * hits / (boundaries + aligned))
                assert close(one["random_precision"], chance / boundaries)
                assert close(one["enrichment"], hits / chance if chance else None)
            strengths = {name: by_convention[name]["enrichment"] or 0 for name in ("last", "next")}
            assert strengths[by_convention["stronger"]] == max(strengths.values())


def test_stability_compares_every_kept_checkpoint_with_the_newest(report: Analysed, run: Path, pieces: list[Piece]
                                                                  ) -> None:
    found = report.found["stability"]
    assert found["newest"] == 9 and [one["step"] for one in found["checkpoints"]] == [3, 6]
    for one in found["checkpoints"]:
        trained = open_trained(run, one["step"])
        model = model_of(trained.config, trained.state, *CPU, "")
        pairs = [(mine, newest) for piece in pieces
                 for mine, newest in list(zip(answer_of(model, piece.ids, piece.targets)[2], piece.b, strict=True))[1:]]
        both = sum(mine and newest for mine, newest in pairs)
        mine, newest = sum(one for one, _ in pairs), sum(one for _, one in pairs)
        count = len(pairs)
        assert one["tokens"] == count and one["boundaries"] == mine
        assert close(one["agreement"], sum(left == right for left, right in pairs) / count)
        assert close(one["f1"], 2 * both / (mine + newest))
        yes = mine / count * newest / count
        no = (1 - mine / count) * (1 - newest / count)
        assert close(one["chance_agreement"], yes + no)
        assert close(one["chance_f1"], 2 * count * yes / (mine + newest))
        assert close(one["tokens_per_concept"], (count + len(pieces)) / (mine + len(pieces)))


def test_content_types_are_counted_passage_by_passage(report: Analysed, run: Path, tokenizer: Tokenizer) -> None:
    trained = open_trained(run)
    model = model_of(trained.config, trained.state, *CPU, "")
    assert report.found["content_types"]["target"] == 4
    for name, one in report.found["content_types"]["types"].items():
        counted = []
        for text in passages(name):
            ids = tokenizer.encode_documents([text])[0].tolist()
            counted.append((len(ids), sum(answer_of(model, ids, [-1] * len(ids))[2])))
        tokens, concepts = (sum(column) for column in zip(*counted, strict=True))
        assert (one["passages"], one["tokens"], one["concepts"]) == (10, tokens, concepts)
        assert close(one["tokens_per_concept"], tokens / concepts)
        assert one["low"] <= one["tokens_per_concept"] <= one["high"] and one["low"] < one["high"]
        assert min(n / k for n, k in counted) < one["low"] and one["high"] < max(n / k for n, k in counted)
        assert list(one["paper"].values()) == list(PAPER[name]) and one["title"] == TYPES[name]


def test_the_packages_own_texts_are_ten_different_passages_of_each_type() -> None:
    every = [text for name in TYPES for text in passages(name)]
    assert len(every) == len(set(every)) == 60
    assert all(100 < len(text) < 900 for text in every)


def test_r_over_training_is_what_the_run_logged(report: Analysed, run: Path) -> None:
    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
             if line["kind"] == "train"]
    found = report.found["ratio_history"]
    assert found["steps"] == [line["step"] for line in lines] and found["tokens"] == [line["tokens"] for line in lines]
    assert (found["target"], found["low"], found["high"]) == (4, 3.6, 4.4)
    for name in ("R_sampled", "R_thresholded"):
        assert found["all"][name] == pytest.approx([line[name] for line in lines], rel=1e-12)
        for domain in ("en", "zh"):
            logged = [line["domains"].get(domain, {}).get(name) for line in lines]
            assert all(close(*pair, 1e-12) for pair in zip(found["domains"][domain][name], logged, strict=True))


def test_tokens_of_shown_texts_have_their_own_p_length_and_loss(report: Analysed, pieces: list[Piece],
                                                                 tokenizer: Tokenizer) -> None:
    shown = report.found["documents"]["domains"]
    assert [len(one) for one in shown.values()] == [2, 2]
    by_text = defaultdict[str, list[Piece]](list)
    for piece in pieces:
        by_text[tokenizer.decode(piece.ids)].append(piece)
    for domain, documents in shown.items():
        for document in documents:
            (piece,) = by_text["".join(cell["text"] for cell in document["cells"])]
            tokens = [token for cell in document["cells"] for token in cell["tokens"]]
            assert piece.domain == domain and len(tokens) == len(piece.ids) == document["tokens"]
            concept, owners = 0, []
            for closes in piece.b:
                owners.append(concept)
                concept += closes
            for place, token in enumerate(tokens):
                assert token["p"] == pytest.approx(piece.p[place], abs=1e-4)
                assert token["boundary"] == piece.b[place]
                assert token["length"] == (owners.count(owners[place]) if owners[place] < concept else None)
                loss = piece.nll[place - 1] if place else None
                assert token["loss"] == (None if loss is None else pytest.approx(loss, abs=1e-4))
            last = [len(cell["tokens"]) for cell in document["cells"]]
            ends = [sum(last[:number + 1]) - 1 for number in range(len(last))]
            assert [cell["concept"] for cell in document["cells"]] == [
                owners[end] if owners[end] < concept else None for end in ends]
