"""Single parts on small cases: units of text, chance, cells of whole characters, clustered errors, FLOPs, scales."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.compose import load_config
from dlcm_lightning.config import BoundaryConfig, ModelConfig
from dlcm_lightning.data.tokenizer import Tokenizer, train_bpe
from dlcm_lightning.evaluation.analysis import compute
from dlcm_lightning.evaluation.analysis.alignment import holding, measures, tally_of
from dlcm_lightning.evaluation.analysis.clustered import bootstrap_ratio, mean, ratio
from dlcm_lightning.evaluation.analysis.concept_position import positions_in_concept
from dlcm_lightning.evaluation.analysis.documents import cells_of
from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens
from dlcm_lightning.evaluation.analysis.ratio_history import ratio_history, read_metrics
from dlcm_lightning.evaluation.analysis.scales import Axis, brief, nice_step, spanning, spread_apart
from dlcm_lightning.evaluation.analysis.text_units import decode, units_of
from dlcm_lightning.flops import forward_flops
from tests.synthetic import make_texts


def spelled(text: str, kind: str, ended: bool = True) -> tuple[list[str], list[str]]:
    """The text up to and with each last byte, and from each next byte on."""
    content = text.encode()
    found = units_of(content, ended)[kind]
    return ([content[:last + 1].decode("utf-8", "replace")[-2:] for last in found.last],
            [content[first:].decode("utf-8", "replace")[:2] for first in found.next])


def test_units_end_and_begin_where_a_reader_would_say() -> None:
    text = 'He said "no." Then, 3.5 times!\nif (a != b_c):\n'
    assert spelled(text, "words") == (
        ["He", "id", "no", "en", " 3", ".5", "es", "if", "(a", "_c"],
        ["sa", "no", "Th", "3.", "5 ", "ti", "if", "a ", "b_"])
    assert spelled(text, "sentences") == (['."', "s!"], ["Th", "if"])
    assert spelled(text, "lines") == (["!\n", ":\n"], ["if"])
    assert spelled(text, "signs")[0] == [' "', '."', "n,", "3.", "s!", " (", "!=", "):"]
    assert spelled(text, "signs")[1] == ["no", "Th", "3.", "5 ", "if", "a ", "b_"]


def test_accents_and_vowel_signs_belong_to_their_word() -> None:
    for text in ("नमस्ते दुनिया", "cafe\u0301 noir", "مَرْحَبًا بك"):
        last, _ = spelled(text, "words")
        assert len(last) == 2, (text, last)


def test_chinese_has_sentences_and_signs_and_no_words() -> None:
    assert spelled("天地玄黄。宇宙洪荒！OK吗？", "words") == (["OK"], [])
    assert spelled("天地玄黄。宇宙洪荒！OK吗？", "sentences") == (["黄。", "荒！", "吗？"], ["宇宙", "OK"])


def test_a_unit_that_touches_the_end_of_a_cut_text_is_left_out() -> None:
    assert spelled("one two", "words", ended=True)[0] == ["ne", "wo"]
    assert spelled("one two", "words", ended=False) == (["ne"], ["tw"])
    assert spelled("one.", "sentences", ended=False) == ([], [])
    assert spelled("one\n", "lines", ended=False) == (["e\n"], [])


def test_bytes_that_are_no_characters_keep_places_right() -> None:
    content = b"\xe9\x97ab \xf0\x9f\x98\x80c\xe4"
    text, begins = decode(content)
    assert begins == [0, 1, 2, 3, 4, 5, 9, 10, 11] and len(text) == 8
    found = units_of(content, True)
    assert found["words"].last == [3, 9] and found["words"].next == [9]
    assert found["signs"].last == [8]  # broken bytes are no punctuation


def test_a_token_holds_the_bytes_it_stands_for() -> None:
    ends = np.cumsum([0, 3, 1, 0, 4])  # a control token, three tokens, another control token between
    assert holding(ends, [0, 3, 7]).tolist() == [False, True, True, False, True]
    assert holding(ends, [2]).tolist() == [False, True, False, False, False]
    assert not holding(ends, []).any()


@pytest.mark.parametrize("seed", range(4))
def test_chance_is_the_mean_over_all_ways_to_place_the_boundaries(seed: int) -> None:
    dice = random.Random(seed)
    total, exact = np.zeros(5), []
    for _ in range(3):  # pieces of a domain
        tokens = dice.randint(3, 8)
        boundaries = dice.randint(1, tokens)
        aligned = np.array([dice.random() < 0.4 for _ in range(tokens)])
        decided = np.zeros(tokens, dtype=bool)
        decided[dice.sample(range(tokens), boundaries)] = True
        total += tally_of(decided, aligned)
        ways = [sum(bool(aligned[place]) for place in chosen)
                for chosen in itertools.combinations(range(tokens), boundaries)]
        exact.append((sum(ways) / len(ways), boundaries))
    expected = sum(hits for hits, _ in exact) / sum(count for _, count in exact)
    assert measures(*total)["random_precision"] == pytest.approx(expected, rel=1e-12)


def test_measures_of_nothing_are_none() -> None:
    found = measures(0, 0, 0, 0, 0)
    assert [found[name] for name in ("precision", "recall", "f1", "random_precision", "enrichment")] == [None] * 5


def test_positions_restart_at_every_boundary() -> None:
    boundaries = np.array([1, 0, 0, 1, 1, 0, 1], dtype=bool)
    assert positions_in_concept(boundaries).tolist() == [0, 1, 2, 0, 0, 1, 0]


def test_the_clustered_error_of_single_tokens_is_the_usual_one_and_grows_with_clusters() -> None:
    values = np.random.default_rng(0).normal(size=60)
    alone = mean(values, np.arange(60))
    assert alone.error == pytest.approx(values.std(ddof=1) / math.sqrt(60))
    doubled = mean(values.repeat(2), np.arange(60).repeat(2))  # each token twice: nothing new is known
    assert doubled.value == pytest.approx(alone.value) and doubled.error == pytest.approx(alone.error)
    assert mean(values, np.zeros(60)).error is None
    assert ratio(values, np.zeros(60), np.arange(60)).value is None


def test_the_bootstrap_covers_and_is_the_same_every_time() -> None:
    tokens, concepts = [10, 20, 30, 40], [5, 4, 10, 10]
    low, high = bootstrap_ratio(tokens, concepts)
    assert low < 100 / 29 < high and (low, high) == bootstrap_ratio(tokens, concepts)
    assert bootstrap_ratio([8, 8], [2, 2]) == (4, 4)


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """Few merges: Chinese characters are spelled in three tokens."""
    return train_bpe(make_texts("english", 50), 262)


def shown(tokenizer: Tokenizer, ids: list[int], boundaries: list[bool], most: int = 99) -> list[tuple[str, int | None]]:
    size = len(ids)
    tokens = Tokens(np.array(ids), np.array([*ids[1:], -100]), np.zeros(size, dtype=int), np.arange(size) == 0,
                    np.zeros(size, dtype=int), np.zeros(size, dtype=int), np.zeros(size, dtype=int), 1, ["d"])
    answer = Answer(np.arange(size) / 10, np.full(size, 0.25), np.array(boundaries), 0.5)
    return [(cell["text"], cell["concept"]) for cell in cells_of(tokens, answer, tokenizer, 0, size, most)]


def test_characters_spelled_in_several_tokens_are_one_cell(bytewise: Tokenizer) -> None:
    ids = bytewise.encode_documents(["ab天c"])[0].tolist()
    pieces = bytewise.pieces(ids)
    assert max(map(len, pieces)) == 1 and len(ids) == 8
    boundaries = [True, False, False, True, False, False, False, True]  # one of them inside the character
    assert shown(bytewise, ids, boundaries) == [("", 0), ("a", 1), ("b", 1), ("天", 2), ("c", 2), ("", 2)]
    assert shown(bytewise, ids, boundaries, 5) == [("", 0), ("a", 1), ("b", 1)]  # no half character at the cut
    assert shown(bytewise, ids[:5], boundaries[:5])[-1] == ("\ufffd", None)  # where the row itself ends


def test_what_lies_behind_the_last_boundary_belongs_to_no_concept(bytewise: Tokenizer) -> None:
    ids = bytewise.encode_documents(["abc"])[0].tolist()
    concepts = [concept for _, concept in shown(bytewise, ids, [True, True, False, False, False])]
    assert concepts == [0, 1, None, None, None]


def test_the_partner_of_table_3_is_the_papers_baseline() -> None:
    partner = compute.dense_partner(ModelConfig())
    assert (partner.layers, partner.width, partner.heads, partner.ffn) == (32, 1536, 24, 4096)
    dense = load_config("configs/run/dense_1b_1t.yaml").model
    for context in (1024, 8192, 131072):
        counted = forward_flops(dense, context)
        assert partner.flops("score", context) == counted.total
        assert partner.flops("prefill", context) == counted.total - counted.unembedding
        maps = sum(4 * dense.heads_token * dense.head_dim * context for _ in range(dense.decoder_layers))
        assert partner.flops("decode", context) == counted.body + counted.unembedding + maps
    found = compute.claim()
    assert round(found["at_context"]["score"], 2) == 0.90
    assert found["weights_per_token"] == {"dense": 905969664, "dlcm": 905969664, "same_parameters": 1925185536}


@pytest.mark.parametrize("ratio_", [2.0, 4.0, 5.3])
def test_decoding_costs_what_its_parts_add_up_to(ratio_: float) -> None:
    """Token by token: matrices as in a forward, attention over what is in the caches."""
    config = replace(ModelConfig(), encoder_layers=3, backbone_layers=5, decoder_layers=2)
    context, flops = 640, 0.0
    pair = 4 * config.head_dim  # of one head, one query and one key: two products of multiply and add
    flops += (config.encoder_layers + config.decoder_layers) * config.heads_token * pair * context
    flops += config.heads_token * pair * context / ratio_  # cross-attention over concepts
    flops += config.backbone_layers * config.heads_concept * pair * (context / ratio_) / ratio_
    for rows, columns, rate in _matrices(config, ratio_):
        flops += 2 * rows * columns * rate
    assert compute.dlcm_flops(config, "decode", context, ratio_) == pytest.approx(flops, rel=1e-12)
    reading = forward_flops(config, context, 1 / ratio_)
    assert compute.dlcm_flops(config, "score", context, ratio_) == reading.total
    assert compute.dlcm_flops(config, "prefill", context, ratio_) == reading.total - reading.unembedding


def test_what_is_stated_of_a_model_is_its_cost_over_its_partners() -> None:
    config = replace(ModelConfig(), backbone_layers=4, boundary=BoundaryConfig(target_ratio=3.0))
    found = compute.compute(config, 3.7)["own"]
    partner = compute.dense_partner(config)
    for phase in compute.PHASES:
        lines = found["phases"][phase]["ratios"]
        assert [(one["ratio"], one["realised"]) for one in lines] == [
            (2, False), (3, False), (4, False), (8, False), (16, False), (3.7, True)]
        for one in lines:
            for number, context in enumerate(compute.CONTEXTS):
                own, dense = compute.dlcm_flops(config, phase, context, one["ratio"]), partner.flops(phase, context)
                assert (one["dlcm"][number], one["relative"][number]) == (own, own / dense)
    assert "own" not in compute.compute(replace(config, kind="dense"), None)


def _matrices(config: ModelConfig, ratio_: float) -> list[tuple[int, int, float]]:
    """Rows, columns and uses per token of every matrix."""
    d, e, head = config.d_token, config.d_concept, config.head_dim
    token = [(d, config.heads_token * head)] * 2 + [(d, config.kv_heads_token * head)] * 2 + [(d, config.ffn_token)] * 3
    concept = ([(e, config.heads_concept * head)] * 2 + [(e, config.kv_heads_concept * head)] * 2
               + [(e, config.ffn_concept)] * 3)
    every = [(*one, 1.0) for one in token] * (config.encoder_layers + config.decoder_layers)
    every += [(*one, 1 / ratio_) for one in concept] * config.backbone_layers
    every += [(d, d, 1.0)] * 2 + [(d, e, 1 / ratio_)]  # boundary, up-projection
    every += [(d, config.heads_token * head, 1.0)] * 2 + [(e, config.kv_heads_token * head, 1 / ratio_)] * 2
    return [*every, (d, config.vocab_size, 1.0)]


def test_a_partner_has_equal_weights_per_token_and_some_ffn() -> None:
    for target in (1.5, 4.0, 400.0):
        config = replace(ModelConfig(), encoder_layers=1, decoder_layers=1, backbone_layers=30,
                         boundary=BoundaryConfig(target_ratio=target))
        partner = compute.dense_partner(config)
        layer = 4 * partner.width * partner.heads * partner.head_dim + 3 * partner.width * partner.ffn
        assert partner.layers * layer == pytest.approx(partner.body) and partner.ffn >= 1


def test_half_written_lines_and_foreign_ones_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = '{"kind": "train", "step": %d, "tokens": %d, "R_sampled": %s, "R_thresholded": 5.0}'
    lines = [good % (n, 10 * n, "2.0" if n % 2 else "NaN") for n in range(1, 402)]
    file.write_text("\n".join(["[]", "nonsense", *lines,
                               '{"kind": "validation", "step": 9, "tokens": 90, "R_sampled": 1.0}', '{"kind": "tr']))
    assert len(read_metrics(file)) == 402
    found = ratio_history(tmp_path, 4, 10**9)
    assert found["lines"] == 401 and found["lines_per_point"] == 3 and len(found["steps"]) == 134
    assert found["steps"][-1] == 401 and set(found["all"]["R_sampled"]) == {2.0}
    assert "absent" in ratio_history(None, 4, 1) and "absent" in ratio_history(tmp_path / "gone", 4, 1)


def test_a_windows_ratio_is_tokens_over_concepts(tmp_path: Path) -> None:
    line = '{"kind": "train", "step": %d, "tokens": %d, "R_sampled": %d, "R_thresholded": 5}'
    (tmp_path / "metrics.jsonl").write_text("\n".join(line % (n, n, 2 if n % 2 else 6) for n in range(400)))
    assert set(ratio_history(tmp_path, 4, 10**9)["all"]["R_sampled"]) == {3.0}  # 12 tokens in 4 concepts


def test_ticks_are_round_and_labels_stand_apart() -> None:
    assert [nice_step(one) for one in (6, 0.7, 11, 29)] == [1, 0.2, 2, 5]
    assert [label for _, label in Axis("", 1024, 131072, True).marks()][::7] == ["1k", "128k"]
    axis = spanning("", [0.31, 4.2])
    assert (axis.low, axis.high) == (0, 5) and [value for value, _ in axis.marks()] == [0, 1, 2, 3, 4, 5]
    assert spanning("", [2.0]).low < 2 < spanning("", [2.0]).high
    assert brief(-0.5) == "\N{MINUS SIGN}0.5" and brief(1.6e6) == "1.6M" and brief(0.1 + 0.2) == "0.3"
    assert spread_apart([50, 50, 51], 12, 0, 100) == [50, 62, 74]
    assert spread_apart([99, 98], 12, 0, 100) == [100, 88]
