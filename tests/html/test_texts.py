"""Texts in the colours of their experts."""

import numpy as np

from cbtm_pipeline.html import texts
from cbtm_pipeline.mixture import switches


def test_a_text_is_escaped_and_each_run_names_its_expert():
    text = texts.Text("a<b", 1, ["<b>", " x", "\x1b[2J&"], [0, 0, 7])
    page = texts.texts_section([text], [str(j) for j in range(8)])
    assert '<span class="c0" title="expert 0"><sup>0</sup>&lt;b&gt; x</span>' in page
    assert '<span class="c1" title="expert 7"><sup>7</sup>\\x1b[2J&amp;</span>' in page
    assert "\x1b" not in page and "<b>" not in page and "a&lt;b: 1 switches" in page
    assert '<li class="c1">7: expert 7</li>' in page


def test_documents_with_most_some_and_fewest_switches_are_chosen():
    n_switches, length = [3, 0, 9, 5, 1], 20
    columns = [np.minimum(np.arange(length), n) % 2 for n in n_switches]
    logw_NK = np.log(np.eye(2)[np.concatenate(columns)] * 0.8 + 0.1)
    ids = np.array(list("abcde"))
    found = switches.examples(logw_NK, np.arange(6) * length, ids)
    assert [(one["doc_id"], one["n_switches"]) for one in found] == [("c", 9), ("a", 3), ("b", 0)]
    assert found[0]["expert"] == columns[2].tolist()
    assert switches.examples(logw_NK[:3], np.array([0, 3]), ids[:1]) == []
    long = switches.examples(np.tile(logw_NK, (10, 1)), np.array([0, 1000]), ids[:1])
    assert [len(one["expert"]) for one in long] == [switches.MAX_TOKENS]
