"""The benchmarks' own arithmetic: what is counted, kept, compared and reported."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import contenders, data, environment, layer, model, paths, report, run, timing
from benchmarks.agreement import check_ours
from benchmarks.bert import POSITIONS, SEGMENTS, SIZES, VOCABULARY, Classifier, rte_like_batch
from benchmarks.contenders import PublishedMixout, Shape, problem
from benchmarks.encoder import with_mixout
from benchmarks.records import Records
from mixout_fast import MixLinear, backends, testing

README = Path(report.__file__).parent.parent / "README.md"
DOCUMENTS = ("docs/measurements.md", "docs/performance.md")


def test_metrics_by_hand():
    predicted, labels = torch.tensor([1, 1, 0, 0, 1.0]), torch.tensor([1, 0, 0, 1, 1])
    assert data.accuracy(predicted, labels) == pytest.approx(3 / 5)
    assert data.f1(predicted, labels) == pytest.approx(2 * 2 / (3 + 3))
    # Two hits, one correct rejection, one false alarm, one miss.
    assert data.correlation(predicted, labels) == pytest.approx((2 * 1 - 1 * 1) / (3 * 2 * 3 * 2) ** 0.5)
    assert data.f1(torch.zeros(5), labels) == 0.0
    assert data.correlation(torch.ones(5), labels) == 0.0


def test_spearman_shares_the_ranks_of_ties():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5.
    a, b = torch.tensor([0.1, 5.0, 5.0, 7.0]), torch.tensor([-3.0, 0.0, 2.0, 2.0])
    assert data._ranks(a).tolist() == [1, 2.5, 2.5, 4]
    deviations = [(-1.5, -1.5), (0, -0.5), (0, 1.0), (1.5, 1.0)]
    products, squares = sum(x * y for x, y in deviations), [sum(d[i] ** 2 for d in deviations) for i in (0, 1)]
    assert data.spearman(a, b) == pytest.approx(products / (squares[0] * squares[1]) ** 0.5)
    assert data.spearman(a, a**3) == pytest.approx(1.0)
    assert data.spearman(a, -a) == pytest.approx(-1.0)


def test_results_survive_being_cut_off_in_the_middle_of_a_line(tmp_path):
    records = started(tmp_path)
    records.append({"cell": {"p": 0.1}, "value": 1})
    records.append({"cell": {"p": 0.2}, "value": 2})
    with records.path.open("a") as file:
        file.write('{"cell": {"p": 0.3}, "va')
    again = started(tmp_path)
    assert [cell["value"] for cell in again.cells.values()] == [1, 2]
    again.append({"cell": {"p": 0.1}, "value": 3})
    lines = [json.loads(line) for line in records.path.read_text().splitlines()]
    assert [line["cell"]["p"] for line in lines if "cell" in line] == [0.1, 0.2, 0.1]
    assert [cell["value"] for cell in Records(records.path).cells.values()] == [3, 2], "the later line counts"


def test_results_of_another_environment_do_not_count_and_stay_until_there_are_new_ones(tmp_path):
    started(tmp_path).append({"cell": {"p": 0.1}})
    other = Records(tmp_path / "results.jsonl")
    assert other.start({"code": "b", "threads": 2}, {}) == ["code"]
    assert not other.cells
    assert Records(other.path).cells
    other.append({"cell": {"p": 0.2}})
    assert [cell["cell"]["p"] for cell in Records(other.path).cells.values()] == [0.2]


def started(folder):
    records = Records(folder / "results.jsonl")
    records.start({"code": "a", "threads": 2}, {"date": "", "command": "", "commit": ""})
    return records


@pytest.fixture
def suite(monkeypatch):
    """A suite of three cells that records what is measured, in place of the real suites."""
    measured = []

    def measure(cell, options):
        measured.append(cell["p"])
        if cell["p"] in stand_in.failing:
            raise AssertionError("dW: error too large")
        return {"contenders": dict.fromkeys(stand_in.contenders), "left_out": {}, "ratios": {}, "other_load": 0.0}

    stand_in = SimpleNamespace(
        SOURCES=(),
        failing=[],
        contenders=["ours"],
        measured=measured,
        cells=lambda options: [{"p": p} for p in (0.1, 0.5, 0.9)],
        wanted=lambda options: stand_in.contenders,
        seconds=lambda options: options.seconds or 1.0,
        measure=measure,
    )
    monkeypatch.setattr(run, "SUITES", {"layer": stand_in})
    return stand_in


def test_a_second_run_measures_only_what_is_missing(suite, tmp_path):
    def measured(*arguments):
        suite.measured.clear()
        status = run.main(["--suite", "layer", "--device", "cpu", "--results", str(tmp_path), *arguments])
        return status, list(suite.measured)

    suite.failing = [0.5]
    assert measured() == (1, [0.1, 0.5, 0.9]), "a failing cell does not cost the others, but shows in the exit status"
    assert measured() == (1, [0.5])
    suite.failing = []
    assert measured() == (0, [0.5])
    assert measured() == (0, [])
    assert measured("--seconds", "2") == (0, [0.1, 0.5, 0.9]), "longer than before"
    assert measured("--seconds", "1") == (0, [])
    suite.contenders.append("dropout")
    assert measured("--seconds", "1") == (0, [0.1, 0.5, 0.9]), "another contender"
    assert measured("--fresh", "--budget", "0") == (0, []), "no time, no cell, and what is there stays"
    assert measured() == (0, [])
    assert measured("--fresh") == (0, [0.1, 0.5, 0.9])
    suite.cells = lambda options: [{"p": 0.5}]
    assert measured("--fresh") == (0, [0.5])
    suite.cells = lambda options: [{"p": p} for p in (0.1, 0.5, 0.9)]
    assert measured() == (0, []), "--fresh leaves the cells that it does not measure"


def test_a_cell_that_leaves_cuda_unusable_ends_the_run_and_comes_last_in_the_next(suite, tmp_path, monkeypatch):
    arguments = ["--suite", "layer", "--device", "cpu", "--results", str(tmp_path)]
    suite.failing = [0.5]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: 0.5 in suite.measured)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=RuntimeError("CUDA error")))
    for measured in ([0.1, 0.5], [0.9, 0.5]):
        suite.measured.clear()
        with pytest.raises(SystemExit) as exit:
            run.main(arguments)
        assert exit.value.code == run.CUDA_IS_LOST
        assert suite.measured == measured


def test_variables_that_choose_instruction_sets_belong_to_the_environment(monkeypatch):
    before = environment.environment("cpu", ()), environment.occasion()["command"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    after = environment.environment("cpu", ()), environment.occasion()["command"]
    assert "ATEN_CPU_CAPABILITY=avx2" in after[0]["variables"].split()
    assert before[0]["variables"] != after[0]["variables"]
    assert "ATEN_CPU_CAPABILITY=avx2" in after[1]
    assert "ATEN_CPU_CAPABILITY" not in before[1]


def test_what_the_warm_up_takes_is_not_other_load(monkeypatch):
    """Compilers run in processes of their own while torch.compile warms up."""
    clock = {"total": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr(timing, "cpu_seconds", lambda: tuple(clock.values()))
    calls = []

    def step(mark):
        compiles = len(calls) < timing.WARMUP_ROUNDS
        calls.append(compiles)
        clock["total"] += 2.0
        clock["busy"] += 1.5 if compiles else 0.75
        clock["own"] += 0.5
        mark()
        mark()

    _, other_load = timing.alternate({"a": step}, ("forward",), "cpu", seconds=0.0)
    assert other_load == pytest.approx(0.25 / 2.0)


def test_a_disturbed_cell_is_measured_again():
    suite = SimpleNamespace(wanted=lambda options: [], seconds=lambda options: 1.0)
    record = {"contenders": {}, "left_out": {}, "seconds": 1.0}
    assert run.is_finished({**record, "other_load": 0.01}, suite, None)
    assert not run.is_finished({**record, "other_load": 0.2}, suite, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--p", "1.5"], "not in [0, 1]"),
        (["--contenders", "dropuot"], "dropuot; on this cpu: ours, linear, dropout"),
        (["--dtypes", "tf32"], "only GPUs have it"),
        (["--shapes", "2048x768"], "'2048x768'"),
        (["--shapes", "2048x768t"], "'2048x768t'"),
    ),
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.parse_options(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def layer_cells(*arguments):
    return layer.cells(run.parse_options(["--device", "cpu", *arguments]))


def test_cells_are_every_combination_once():
    cells = layer_cells("--shapes", "16x32x8", "4x32x8", "--p", "0.5", "1", "--dtypes", "fp32", "bf16")
    assert len(cells) == 8
    assert {"shape": "4x32x8", "p": 1.0, "dtype": "bf16"} in cells
    default = [tuple(cell.values()) for cell in layer_cells()]
    assert len(default) == len(set(default))
    assert len(layer_cells("--targets")) == 24
    sizes = {size for sizes in layer.LAYERS.values() for size in sizes}
    assert len(layer_cells("--full")) == len(sizes) * len(layer.ROWS) * len(layer.P)


def test_phases_are_timed_apart_and_contenders_in_every_round():
    order = []

    def step(name, first, second):
        def sleep(mark):
            order.append(name)
            mark()
            time.sleep(first)
            mark()
            time.sleep(second)
            mark()

        return sleep

    steps = {"a": step("a", 0.002, 0.004), "b": step("b", 0.001, 0.001)}
    times, _ = timing.alternate(steps, ("forward", "backward"), "cpu", seconds=0.0, repeats=2)
    assert all(len(times[name]["step"]) == timing.MIN_ROUNDS for name in steps)
    rounds = [order[i : i + 4] for i in range(4 * timing.WARMUP_ROUNDS, len(order), 4)]
    assert all(sorted(names) == ["a", "a", "b", "b"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 2, "the order changes"
    # Sleeps may last longer, never shorter.
    assert min(times["a"]["forward"]) >= 0.002
    assert min(times["a"]["backward"]) >= 0.004
    for forward, backward, step_seconds, host in zip(*times["a"].values(), strict=True):
        assert step_seconds == pytest.approx(forward + backward)
        assert host >= step_seconds
    assert timing.ratio({"step": [2.0, 6.0, 4.0]}, {"step": [1.0, 2.0, 2.0]}, "step")["median"] == 2.0


def test_backends_that_are_not_chosen_are_timed_beside_the_one_that_is(monkeypatch):
    def backend(reason):
        return SimpleNamespace(unavailable=lambda device_type: reason)

    served = {"first": backend(None), "unable": backend("no compiler"), "second": backend(None)}
    monkeypatch.setattr(backends, "BACKENDS", served | {"reference": backends.BACKENDS["reference"]})
    assert contenders.other_backends("cpu") == ["ours-second"]
    options = SimpleNamespace(quick=True, targets=False, device="cpu", contenders=None)
    assert layer.wanted(options) == ["ours", "linear", "dropout", "ours-second", "published"]
    monkeypatch.setattr(backends, "DEFAULT", "second")
    assert contenders.other_backends("cpu") == ["ours-first"]


def test_the_hosts_time_stands_beside_the_steps(tmp_path):
    records = started(tmp_path)
    times = {"linear": (0.05, 0.02), "ours": (0.1, 0.0981), "ours-triton": (0.2, 0.2)}
    figures = {name: {"step_ms": {"median": step}, "host_ms": {"median": host}} for name, (step, host) in times.items()}
    figures["ours"]["graph_ms"] = {"median": 0.03}
    cell = {"shape": "4x8x8", "p": 0.9, "dtype": "bf16"}
    records.append({"cell": cell, "contenders": figures, "ratios": {"linear": {}, "ours-triton": {}}})
    header, _, row = report.host_table(records).splitlines()
    assert re.split(r"\s*\|\s*", header)[4:-1] == ["ours", "nn.Linear", "ours-triton"]
    assert re.split(r"\s*\|\s*", row)[1:-1] == ["4x8x8", "bf16", "0.9", "100 / 98 / 30", "50 / 20 / -", "200 / 200 / -"]


def test_on_a_gpu_phases_come_from_events_of_back_to_back_steps(monkeypatch):
    """With fake events and a fake synchronisation, which log their calls."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = len(log)
            log.append("mark")

        def elapsed_time(self, end):
            return 1000.0 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))

    def step(mark):
        mark()
        log.append("forward")
        mark()
        log.extend(["backward"] * 3)
        mark()

    times, other_load = timing.alternate({"a": step}, ("forward", "backward"), "cuda", seconds=0.0, repeats=2)
    one_step = ["mark", "forward", "mark", *["backward"] * 3, "mark"]
    assert log[: len(log) // (timing.MIN_ROUNDS + timing.WARMUP_ROUNDS)] == ["wait", *one_step, *one_step, "wait"]
    assert times["a"]["forward"] == [2.0] * timing.MIN_ROUNDS
    assert times["a"]["backward"] == [4.0] * timing.MIN_ROUNDS
    assert other_load is None


def test_saved_bytes_are_the_input_of_a_linear_layer():
    case = problem(Shape(32, 48, 16), 0.9, torch.float32)
    assert layer.saved_bytes(torch.nn.Linear(48, 16), case.input) == 32 * 48 * 4


def test_floor_by_hand():
    """10 rows, K = 100, N = 20, p = 0.99, where the capacity is 16 of 100 columns."""
    shape = Shape(10, 100, 20)
    mixing, gathering, expanding = 3 * 2000, 2 * 10 * 16, 20 * 16 + 1980
    want = {"y": 4 * (mixing + gathering), "dX": 4 * mixing, "dW": 4 * expanding}
    assert layer.moved_bytes(shape, 0.99, 4) == want
    assert layer.moved_bytes(shape, 0.0, 4) == {}
    assert layer.floor_ms(0.9, 3.0, 0.5) == pytest.approx(2.1 + 0.5)


def test_a_step_has_the_gradients_that_it_is_asked_for():
    case = problem(Shape(4, 8, 3), 0.5, torch.float32)
    for gradients in (("dX",), ("dW",), ("db",), ("dX", "dW", "db")):
        step = layer.LayerStep(contenders.ours, case, 2, gradients)
        for _ in range(3):
            step(lambda: None)
        for x, linear in ((x, linear) for linear, x, _ in (next(step.rotation) for _ in range(2))):
            named = {"dX": x, "dW": linear.weight, "db": linear.bias}
            assert [name for name, tensor in named.items() if tensor.grad is not None] == list(gradients)


def test_terms_are_measured_and_reported(tmp_path):
    arguments = ["--suite", "terms", "--quick", "--device", "cpu", "--seconds", "0.01", "--results", str(tmp_path)]
    assert run.main(arguments) == 0
    (records,) = report.load(tmp_path, "terms", quick=True)
    (cell,) = report.measured(records)
    figures = cell["contenders"]["ours"]
    assert figures["step_ms"]["median"] > figures["y_ms"]["median"]
    text = report.terms_table(cell)
    for term in ("y", "dX", "dW", "db"):
        assert f"{figures[f'{term}_ms']['median']:.3f}" in text
    assert cell["floor_ms"]["dX"] > cell["contenders"]["linear"]["dX_ms"]["median"]
    assert figures["db_ms"]["median"] < figures["dX_ms"]["median"] / 2, "a sum over rows beside a product"


def test_both_ways_to_a_product_are_checked_and_timed(tmp_path, monkeypatch):
    """Each way is forced through the backend's tables of rows, which are restored afterwards."""
    arguments = ["--suite", "paths", "--quick", "--device", "cpu", "--results", str(tmp_path)]
    taken = []
    check = paths.check_ours

    def checked(case, backend):
        taken.append((backend, *testing.is_one_pass(case, backend)))
        check(case, backend=backend)

    monkeypatch.setattr(paths, "check_ours", checked)
    before = {name: backends.BACKENDS[name].ONE_PASS_ROWS for name in paths.choosing("cpu")}
    assert run.main(arguments) == 0
    assert taken == [(name, way, way) for name in before for way in (True, False)]
    assert {name: backends.BACKENDS[name].ONE_PASS_ROWS for name in before} == before
    (records,) = report.load(tmp_path, "paths", quick=True)
    (cell,) = report.measured(records)
    assert list(cell["contenders"]) == paths.wanted(SimpleNamespace(device="cpu"))
    text = report.paths_table(records)
    for figures in cell["contenders"].values():
        assert f"{figures['dX_us']:.1f} / {figures['dX_host_us']:.1f}" in text


def test_published_mixout_of_a_column_major_weight_walks_one_layout():
    weight = torch.randn(64, 5, requires_grad=True)
    PublishedMixout.apply(weight.t(), torch.randn(64, 5).t(), 0.75).sum().backward()
    node = PublishedMixout.apply(weight.t(), torch.randn(64, 5).t(), 0.75).grad_fn
    (mask,) = node.saved_tensors
    assert mask.stride() == weight.t().stride()
    assert torch.equal(mask, mask[:1].expand(5, -1))


def test_published_mixout_keeps_whole_columns_and_leaves_out_the_scale_in_backward():
    weight, target = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    mixed = PublishedMixout.apply(weight, target, 0.75)
    mixed.sum().backward()
    kept = weight.grad[0] == 1
    assert 0 < kept.sum() < 64
    assert torch.equal(weight.grad, kept.float().expand(5, -1))
    torch.testing.assert_close(mixed[:, kept], (target + (weight - target) * 4)[:, kept])
    torch.testing.assert_close(mixed[:, ~kept], target[:, ~kept])


def test_a_wrong_layer_is_not_timed(broken, monkeypatch):
    case = problem(Shape(33, 64, 17), 0.5, torch.float32)
    check_ours(case, backend="broken")
    right = broken.mix
    monkeypatch.setattr(broken, "mix", lambda weight, target, *rest: right(target, weight, *rest))
    with pytest.raises(AssertionError, match="against fp64"):
        check_ours(case, backend="broken")
    monkeypatch.setattr(backends, "DEFAULT", "broken")
    with pytest.raises(AssertionError, match="against fp64"):
        model.check_layers(model.pretrained("tiny", "cpu"), "fp32", "cpu")


@pytest.fixture
def measure_layer(tmp_path):
    """Runs the layer suite on one small shape and returns its results."""

    def measure(folder, seconds=0.05):
        cell = ["--shapes", "256x64x48", "--p", "0.9", "--contenders", "dropout", "--seconds", str(seconds)]
        assert run.main(["--suite", "layer", "--device", "cpu", "--results", str(tmp_path / folder), *cell]) == 0
        (records,) = report.load(tmp_path / folder, "layer")
        return records

    return measure


def test_a_slowed_layer_shows_in_the_report(measure_layer, monkeypatch):
    """Over enough rounds that a busy machine does not hide it."""
    (usual,) = report.measured(measure_layer("usual", seconds=1))
    forward = MixLinear.forward

    def slowed(self, input):
        time.sleep(0.02)
        return forward(self, input)

    monkeypatch.setattr(MixLinear, "forward", slowed)
    records = measure_layer("slowed", seconds=1)
    (slow,) = report.measured(records)
    for other in ("linear", "dropout"):
        assert report.step_ratio(slow, other) > 2 * report.step_ratio(usual, other)
    assert slow["floor_share"] < usual["floor_share"] / 2
    assert slow["contenders"]["ours"]["forward_ms"]["median"] > 20
    limits = report.limits_section(records)
    assert "1 of 1 cells with at least 256 rows and p >= 0.7 are slower than nn.Linear" in limits
    assert re.search(r"[\d.]+ times the limit: 256x64x48 p=0.9 fp32", limits)
    assert f"{report.step_ratio(slow, 'dropout'):.2f}" in report.layer_details(records)


def test_a_layer_slowed_since_an_older_run_is_named(tmp_path):
    def layers(folder, *ratios):
        (tmp_path / folder).mkdir()
        records = started(tmp_path / folder)
        for p, ratio in zip((0.5, 0.7, 0.9), ratios, strict=True):
            cell = {"shape": "512x8x8", "p": p, "dtype": "fp32"}
            records.append({"cell": cell, "ratios": {"linear": {"step": {"median": ratio}}}})
        records.append({"cell": {"shape": "16x8x8", "p": 0.9, "dtype": "fp32"}, "error": "AssertionError: dW"})
        return records

    older, newer = layers("older", 0.4, 0.5, 0.6), layers("newer", 0.41, 1.0, 0.6)
    text = report.compared(newer, older)
    assert "median 1.02 of 3" in text
    assert "1 of them above 1.2\n    2.00: 512x8x8 p=0.7 fp32" in text
    assert "0 of them" in report.compared(older, newer)


def test_a_comparison_with_a_folder_that_has_no_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--against", str(tmp_path)])
    assert f"--against: no results of layers in {tmp_path}" in capsys.readouterr().err


def test_the_documents_get_their_tables_and_no_others(measure_layer, tmp_path, monkeypatch):
    records = measure_layer("results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    before = {name: (README.parent / name).read_text() for name in ("README.md", *DOCUMENTS)}
    (tmp_path / "docs").mkdir()
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    arguments = ["--results", str(records.path.parent), "--readme"]
    assert report.main(arguments) == 0
    written = {name: (tmp_path / name).read_text() for name in before}
    (cell,) = report.measured(records)
    pair = f"{report.step_ratio(cell, 'linear'):.2f} / {report.step_ratio(cell, 'dropout'):.2f}"
    assert pair in written["docs/measurements.md"]
    assert report.NOT_MEASURED in written["docs/measurements.md"]
    assert report.NOT_MEASURED in written["README.md"]
    outside = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured: \2 -->)", re.DOTALL)
    for name, text in before.items():
        assert outside.sub(r"\1\3", written[name]) == outside.sub(r"\1\3", text)
    assert report.main(arguments) == 0
    assert {name: (tmp_path / name).read_text() for name in before} == written, "the same results, the same documents"
    with pytest.raises(ValueError, match="measured: tables"):
        report.with_parts(written["README.md"], {"tables": ""})


def test_the_latest_results_of_cpus_and_of_gpus():
    def measured(device, date, **environment):
        run = {"environment": {"device": device, **environment}, "date": f"2026-11-{date}T00:00:00+00:00"}
        return SimpleNamespace(runs=[run], environment=run["environment"])

    older, newer, gpu = measured("a", 20), measured("b", 21), measured("c", 19, cuda="13.0")
    assert set(map(id, report.latest([newer, older, gpu]))) == {id(newer), id(gpu)}


def test_the_report_is_of_this_machine_unless_all_are_asked_for(measure_layer, capsys):
    path = measure_layer("results").path
    device = environment.device_name("cpu")
    path.with_name("layer-other.jsonl").write_text(path.read_text().replace(device, "Another Processor"))
    for arguments, machines in (([], {device}), (["--all"], {device, "Another Processor"})):
        assert report.main(["--results", str(path.parent), *arguments]) == 0
        printed = capsys.readouterr().out
        assert set(re.findall(r"^\*\*(.*), \d+ threads\*\*", printed, re.MULTILINE)) == machines
        for machine in machines:
            assert f"{machine}: a training step of a layer with mixout(0.9) takes" in printed
    path.unlink()
    assert report.main(["--results", str(path.parent)]) == 0
    assert "Another Processor" in capsys.readouterr().out, "where this machine has no results"


def test_the_largest_p_is_told_in_words():
    step = {"step": {"median": 0.5}}
    layers = [
        {"cell": {"p": p, "dtype": dtype}, "ratios": {"linear": step, "dropout": {"step": {"median": p}}}}
        for p, dtype in ((0.5, "fp32"), (0.9, "fp32"), (0.25, "bf16"))
    ]
    layers.append(layers[1] | {"cell": {"p": 1.0, "dtype": "fp32"}})  # which trains nothing
    takes = "a training step of a layer with mixout({}) takes 0.50 to 0.50 of nn.Linear's time and {} of {}'s time ({})"
    assert list(report.layer_in_short(layers)) == [
        takes.format(0.9, "0.90 to 0.90", "nn.Dropout + nn.Linear", "fp32"),
        takes.format(0.25, "0.25 to 0.25", "nn.Dropout + nn.Linear", "bf16"),
    ]
    cell = {"cell": {"model": "tiny", "precision": "fp32", "mode": "eager"}}
    ratios = {
        "none": step,
        "mixout(0.9)": {"step": {"median": 0.25}},
        "mixout(0.75)": step,
        "mixout(1)": step,
        "published(1)": step,
    }
    assert list(report.model_in_short([cell | {"ratios": ratios}])) == [
        "a finetuning step of tiny with mixout(0.9) takes 0.25 of dropout(0.1)'s time (fp32, eager)"
    ]
    saved = {"dropout(0.1)": 8, "mixout(0.9)": 2, "mixout(0.1)": 4}
    contenders = {method: {"saved_bytes": bytes} for method, bytes in saved.items()}
    (text,) = report.memory_in_short([cell | {"contenders": contenders}])
    assert text == "tiny with mixout(0.9) saves 0.25 of dropout(0.1)'s bytes for backward"


def test_a_report_of_failed_cells_alone_names_them(tmp_path, monkeypatch, capsys):
    def wrong(*_, **__):
        raise AssertionError("dW")

    monkeypatch.setattr("benchmarks.layer.check_ours", wrong)
    cell = ["--shapes", "256x64x48", "--p", "0.9", "--contenders", "dropout"]
    assert run.main(["--suite", "layer", "--device", "cpu", "--results", str(tmp_path), *cell]) == 1
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "failed: 256x64x48 p=0.9 fp32: AssertionError: dW" in capsys.readouterr().out


def test_failed_and_missed_cells_are_named(tmp_path):
    records = started(tmp_path)
    records.append({"cell": {"shape": "512x8x8", "p": 0.9, "dtype": "fp32"}, "error": "AssertionError: dW"})
    step = {"step": {"median": 0.5}}
    left_out = {"ours-triton": "dW: error 3 against fp64", "compiled": "no compiler"}
    figures = {"ratios": {"linear": step, "dropout": step}, "floor_share": 1.0, "left_out": left_out}
    records.append({"cell": {"shape": "256x8x8", "p": 0.9, "dtype": "fp32"}, **figures})
    limits = report.limits_section(records)
    assert "failed: 512x8x8 p=0.9 fp32: AssertionError: dW" in limits
    assert "left out: 256x8x8 p=0.9 fp32: ours-triton: dW: error 3 against fp64" in limits
    assert "left out: 256x8x8 p=0.9 fp32: compiled mixout: no compiler" in limits
    assert report.verdict(0.7404, 0.74).endswith("pass")
    assert report.verdict(0.741, 0.74).endswith("miss")


def test_table_is_aligned():
    text = report.table(["name", "x"], [["a", "1.00"], ["longer", "10.00"]])
    assert text.splitlines() == [
        "| name   |     x |",
        "|--------|------:|",
        "| a      |  1.00 |",
        "| longer | 10.00 |",
    ]


def test_a_step_of_every_method_runs_and_starts_at_the_pretrained_model(monkeypatch):
    plain, batch = model.pretrained("tiny", "cpu"), rte_like_batch("cpu", 4, 16)
    for precision in ("fp32", "bf16"):
        model.check_start(plain, batch, precision)
    for name in (model.BASELINE, "none", "mixout(0.5)", "published(0.5)"):
        step = model.TrainingStep(model.method(name)(plain), batch, "fp32")
        start = [parameter.clone() for parameter in step.model.parameters()]
        step(lambda: None)
        moved = [not torch.equal(a, b) for a, b in zip(start, step.model.parameters(), strict=True)]
        assert sum(moved) > len(moved) / 2, name
    model.check_layers(plain, "bf16", "cpu")
    mixed = with_mixout(plain, 0.5)
    assert sum(isinstance(module, MixLinear) for module in mixed.modules()) == 6 * 2 + 1
    with torch.no_grad():
        mixed.base_model.blocks[0].attention.query.target += 1e-3
    monkeypatch.setattr(model, "with_mixout", lambda plain, p: mixed)
    with pytest.raises(AssertionError, match="hidden states"):
        model.check_start(plain, batch, "fp32")


def test_memory_of_a_method_is_measured_in_a_process_of_its_own():
    command = [sys.executable, "-m", "benchmarks.memory", "tiny", "fp32"]
    figures = {}
    for name in ("dropout(0.1)", "mixout(0.9)"):
        done = subprocess.run(
            [*command, name, "cpu", "1"], cwd=README.parent, capture_output=True, text=True, check=True
        )
        figures[name] = json.loads(done.stdout)
    assert figures["mixout(0.9)"]["saved_bytes"] < figures["dropout(0.1)"]["saved_bytes"]
    assert figures["mixout(0.9)"]["peak_bytes"] > figures["mixout(0.9)"]["saved_bytes"]


def test_bert_is_transformers_bert():
    transformers = pytest.importorskip("transformers")
    size = SIZES["tiny"]
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        max_position_embeddings=POSITIONS,
        type_vocab_size=SEGMENTS,
    )
    theirs = transformers.BertForSequenceClassification(config).eval()
    ours = Classifier(size).eval()
    names = {
        "bert.embeddings.word_embeddings": "base_model.embeddings.words",
        "bert.embeddings.position_embeddings": "base_model.embeddings.positions",
        "bert.embeddings.token_type_embeddings": "base_model.embeddings.segments",
        "bert.embeddings.LayerNorm": "base_model.embeddings.norm",
        "bert.encoder.layer": "base_model.blocks",
        "attention.self": "attention",
        "attention.output.dense": "attention_output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "inner",
        "output.dense": "output",
        "output.LayerNorm": "output_norm",
        "bert.pooler.dense": "base_model.pooler",
        "classifier": "head",
    }

    def renamed(key):
        for theirs_name, ours_name in names.items():
            key = key.replace(theirs_name, ours_name)
        return key

    state = {renamed(key): value for key, value in theirs.state_dict().items() if not key.endswith("_ids")}
    ours.load_state_dict(state)
    batch = rte_like_batch("cpu", 4, 32)
    with torch.no_grad():
        want = theirs(input_ids=batch["tokens"], token_type_ids=batch["segments"]).logits
        exact = theirs.double()(input_ids=batch["tokens"], token_type_ids=batch["segments"]).logits
        got = ours(**batch)
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= max(2 * (want - exact).abs().max(), rounding)
    drops = [sum(isinstance(m, torch.nn.Dropout) for m in classifier.modules()) for classifier in (ours, theirs)]
    assert drops[0] == drops[1]
