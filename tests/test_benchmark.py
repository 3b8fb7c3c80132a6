"""The naive reference gives the gradients of the vectorised path, and every section runs. Nothing is timed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
import dataloader
import utils
from benchmarks import measure, naive, sections

ROOT = Path(__file__).parents[1]
TINY = [
    f"--{name}=2" for name in ("bert_num_heads", "num_factors", "lstm_hidden", "num_query_set", "num_inner_steps")
] + [f"--{name}=8" for name in ("bert_hidden_units", "narm_hidden_size", "gru4rec_hidden_size")]
TINY += ["--max_seq_len=7", "--num_samples=5"]


def tiny(*more):
    return benchmark.parse(["--device=cpu", "--reps=1", *TINY, *more])


def tasks_of(options, count=4):
    return measure.draw(options, measure.synthetic(50, 50), count)


@pytest.mark.parametrize("form", measure.FORMS)
@pytest.mark.parametrize("model", ["bert4rec", "sasrec", "narm", "gru4rec"])
def test_naive_reference_gives_the_same_gradients(model, form):
    bench = tiny("--models", model)
    options = measure.settings(form, bench)
    tasks = tasks_of(options)
    assert (tasks.times.max() > 1) == (form == "paper" and model in ("narm", "gru4rec"))
    assert sections.gradient_difference(measure.build(options, bench, 50), tasks) < 1e-12


@pytest.mark.parametrize("more", [["--use_second_order=False", "--use_adaptive_loss=False"], ["--members=2"]])
def test_naive_reference_of_other_methods(more):
    bench = tiny("--adapt=all", *more)
    options = measure.settings("default", bench)
    assert sections.gradient_difference(measure.build(options, bench, 50), tasks_of(options)) < 1e-12


def test_naive_reference_has_wrong_gradients_where_a_window_is_lost():
    bench = tiny("--models", "gru4rec")
    options = measure.settings("paper", bench)
    tasks = tasks_of(options)
    fewer = tasks._replace(times=(tasks.times > 0).to(tasks.times.dtype))
    system = measure.build(options, bench, 50)
    slow = naive.naive_copy(system)
    measure.meta_gradient(system, tasks)
    naive.meta_gradient(slow, naive.lay_out_windows(fewer))
    assert not torch.allclose(
        system.members[0].learner.item_embedding.grad, slow.members[0].learner.item_embedding.grad
    )


@pytest.mark.parametrize("model", ["bert4rec", "gru4rec"])
def test_windows_are_laid_out_one_a_row(model):
    options = measure.settings("paper", tiny("--models", model))
    for task in naive.lay_out_windows(tasks_of(options)):
        length = (task.position > 0).sum(-1)[0]
        assert length[0] == length.max() == task.n_support and len(length) == min(5, 6 * 7 // 2)
        assert (task.position[0, :, 0] == length).all() and (task.times == task.segment).all()
        windows = {tuple(items[:n].tolist()) for items, n in zip(task.items[0], length, strict=True)}
        support = task.items[0, 0, : length[0]].tolist()
        assert len(windows) == len(length)
        assert all(any(support[i : i + len(w)] == list(w) for i in range(len(support))) for w in windows)


def test_operations_are_counted_without_views():
    with sections.CountOperations() as counted:
        (torch.ones(2, 3).T.view(3, 2) + 1).sum()
    assert counted.calls == 3


def test_all_sections_print_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "together", lambda count, function, *given: [function(*given)])
    shown = [section for section in sections.SECTIONS if section != "processes"]
    sizes = ["--users=8", "--tasks=4", "--many_items=90", "--rows=30000", "--min_item=2", "--batch_size=4"]
    data = [f"--data_path={ROOT}/Data/sample/ratings.csv", "--mode=sample", f"--cache_dir={tmp_path}"]
    fit = ["--num_train_iterations=2", "--num_test_data=50"]
    common = ["--device=cpu", "--reps=1", "--models", "gru4rec", "--only", *shown]
    assert benchmark.main([*common, *sizes, *data, *fit, *TINY]) == 0
    printed = capsys.readouterr().out
    for section in shown:
        title = f"\n{section}: {sections.SECTIONS[section].__doc__.splitlines()[0]}\n"
        figures = printed.split(title)[1].split("\n\n")[0]
        assert "paper" in figures or section == "accuracy" and "RMSE" in figures
    assert "nan" not in printed


def test_ranks_take_turns_in_processes_of_their_own():
    bench = tiny("--models", "gru4rec")
    first, second = measure.together(2, sections.take_turns, bench, "default", 4)
    assert first.keys() == {1, 2} and second.keys() == {2} and min(*first.values(), *second.values()) > 0


def test_memory_is_that_of_a_fresh_process_or_unknown(monkeypatch):
    held, bench = np.ones(10**8), tiny()
    assert measure.together(1, measure.peak_memory, bench)[0] < held.nbytes / 1e6 < measure.peak_memory(bench)
    monkeypatch.setattr(measure.Path, "exists", lambda path: False)
    assert math.isnan(measure.peak_memory(bench))


@pytest.mark.parametrize("wrong", [["--only", "cooking"], ["--model=lstm"], ["--reps=0"], ["--fold=9"]])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(utils.UserError):
        benchmark.parse(wrong)


def test_an_outer_step_moves_the_system_and_counts_on():
    take = measure.outer_steps(tiny(), "paper", 4, 50)
    run = take.__closure__[0].cell_contents
    before = [p.clone() for p in [*run.system.parameters()]]
    take()
    assert run.loop["iteration"] == 1 and any(
        (p != q).any() for p, q in zip(before, [*run.system.parameters()], strict=True)
    )
    assert dataloader.AT_ONCE["adapt"] != dataloader.ON_GPU
