from megatron_qlrl.evaluate.best import BestScore, HeldOutScore


def score(steps_done: int, value: float) -> HeldOutScore:
    return HeldOutScore(steps_done, f"step_{steps_done}", value, 0.02)


def test_the_newer_of_equal_scores_is_the_best_and_patience_counts_from_it() -> None:
    ranking = BestScore(patience=2)
    seen = []
    for steps_done, value in enumerate([0.5, 0.7, 0.6, 0.7, 0.69, 0.1], start=1):
        ranking.observe(score(steps_done, value))
        assert ranking.best is not None
        seen.append((ranking.best.steps_done, ranking.exhausted))
    assert seen == [(1, False), (2, False), (2, False), (4, False), (4, False), (4, True)]
    assert ranking.last == score(6, 0.1)


def test_without_patience_nothing_ends_a_run() -> None:
    ranking = BestScore(patience=None)
    for steps_done in range(1, 20):
        ranking.observe(score(steps_done, -steps_done))
    assert not ranking.exhausted


def test_a_resumed_ranking_goes_on_where_it_was() -> None:
    whole, cut = BestScore(2), BestScore(2)
    for steps_done, value in [(1, 0.5), (2, 0.4)]:
        whole.observe(score(steps_done, value))
        cut.observe(score(steps_done, value))
    again = BestScore(2)
    again.load_state_dict(cut.state_dict())
    for ranking in (whole, again):
        ranking.observe(score(3, 0.3))
    assert again.state_dict() == whole.state_dict()
    assert again.exhausted
    fresh = BestScore(2)
    fresh.load_state_dict(BestScore(2).state_dict())
    assert fresh.best is None


def test_a_score_names_its_error_and_step() -> None:
    assert str(score(40, 0.7)) == "0.7000 ± 0.0200 after 40 steps"
    assert str(HeldOutScore(1, "p", 1.0, None)) == "1.0000 after 1 steps"
