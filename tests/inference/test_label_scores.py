"""Scores of labels: each finds its own best label."""

import numpy as np
import pytest

from cbtm_pipeline.inference import label_scores


def test_each_score_has_its_own_best_label() -> None:
    """Label 0 is likely, 1 is long, 2 is unlikely alone, 3 is unlikely after the domain string."""
    logprob_Y, n_tokens_Y = [-2.0, -4.0, -3.0, -3.5], [1, 4, 1, 1]
    alone_Y, domain_Y = [-2.0, -5.0, -9.0, -4.0], [-1.0, -4.0, -5.0, -9.0]
    found = label_scores.chosen(logprob_Y, n_tokens_Y, alone_Y, domain_Y)
    assert found == {"lm": 0, "token_mean": 1, "pmi": 2, "dcpmi": 3}


def test_scores_that_lack_what_they_need_are_left_out() -> None:
    assert label_scores.chosen([-1.0, -0.5]) == {"lm": 1}
    assert set(label_scores.chosen([-1.0, -0.5], domain_Y=[0.0, 0.0])) == {"lm", "dcpmi"}


def test_of_equals_the_first_is_chosen() -> None:
    assert label_scores.chosen([-1.0, -1.0], [1, 1]) == {"lm": 0, "token_mean": 0}


@pytest.mark.parametrize("shift", [0.0, 3.0, -7.0])
def test_pmi_does_not_depend_on_how_likely_all_labels_are(shift: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        logprob_Y, alone_Y = -rng.gamma(2, 2, 5), -rng.gamma(2, 2, 5)
        a = label_scores.chosen(logprob_Y.tolist(), alone_Y=alone_Y.tolist())["pmi"]
        assert a == label_scores.chosen(logprob_Y.tolist(), alone_Y=(alone_Y + shift).tolist())["pmi"]
        assert a == int(np.argmax(logprob_Y - alone_Y))
