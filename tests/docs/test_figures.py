"""Figures in the documents match the results files, and constants match the code."""

from statistics import mean

import pytest
from documents import PAGES, ROOT, links, tables
from result_tables import (
    TABLES,
    fastest_diffusers,
    fp16_error_rows,
    int8_error_rows,
    long_clip_rows,
    quality_rows,
    read,
    table,
)
from sparsectrl_lcm.benchmarks.harness.rounds import summarize
from sparsectrl_lcm.engine import check
from sparsectrl_lcm.engine.rewrites import winograd
from sparsectrl_lcm.runtime import load_options, request
from sparsectrl_lcm.runtime.cpu import compiled_cache, executor, openvino
from sparsectrl_lcm.runtime.format import clip_layout, manifest
from sparsectrl_lcm.runtime.gpu import captures
from sparsectrl_lcm.runtime.gpu import executor as gpu_executor
from sparsectrl_lcm.runtime.output import writers

README = (ROOT / "README.md").read_text()
PRECISIONS = "2026-11-30-precisions.json"
PRECISIONS_FP8 = "2026-11-30-precisions-fp8.json"
PRECISIONS_ON_CPU = "2026-12-01-precisions-int8.json"
LONG_CLIPS = "2026-11-30-long-clips.json"
AVX512_BF16 = "2026-11-29-compare-bf16-epyc-avx512bf16.json"
AMX = "2026-11-27-compare-2cores.json"
AVX2 = "2026-11-28-compare-fp32-2cores.json"
ROWS = {
    "AVX512_BF16, bf16": (AVX512_BF16, "openvino-bf16"),
    "AVX512_BF16, int8 and tiny decoder": (AVX512_BF16, "openvino-int8-tiny"),
    "AMX, bf16": (AMX, "openvino-bf16"),
    "AMX, int8 and tiny decoder": (AMX, "openvino-int8-tiny"),
    "AVX2, fp32": (AVX2, "openvino-fp32"),
}
"""The contender behind each row of the README's table."""


def seconds(file: str, contender: str) -> tuple[float, float, float]:
    """Median seconds of the fastest diffusers, and of a contender's first request and next seed."""
    report = read(file)
    summary = report["contenders"][contender]["summary"]
    return fastest_diffusers(report), *(summary[kind]["total"]["median"] for kind in ("first", "second_seed"))


def test_the_readme_has_the_figures_of_the_results() -> None:
    (rows,) = [rows for rows in tables(README) if rows[0][0] == "processor, precision"]
    assert len(rows) == 1 + len(ROWS)
    for cells, (name, (file, contender)) in zip(rows[1:], ROWS.items(), strict=True):
        diffusers, first, second = seconds(file, contender)
        ratios = f"[{diffusers / first:.2f} and {diffusers / second:.2f}](benchmarks/results/{file})"
        assert cells == [name, f"{diffusers:.1f}", f"{first:.1f}", f"{second:.1f}", ratios]


def test_the_number_of_the_readme_is_the_first_row() -> None:
    diffusers, first, second = seconds(*ROWS["AVX512_BF16, bf16"])
    text = " ".join(README.split())
    assert f"**{first:.1f} s** for a clip" in text
    assert f"**{diffusers / first:.2f} times as fast as diffusers**" in text
    assert f"next seed takes {second:.1f} s, {diffusers / second:.2f} times as fast" in text


@pytest.mark.parametrize("file", sorted({file for file, _ in ROWS.values()}))
def test_summaries_are_those_of_the_samples(file: str) -> None:
    report = read(file)
    assert all(row["summary"] == summarize(row["samples"]) for row in report["contenders"].values())
    assert report["request"] == {"width": 256, "height": 256, "frames": 16, "steps": 4, "guidance": 1.0}
    assert report["threads"] == report["machine"]["cores"] == 2


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_benchmarks_are_those_of_the_results(name: str) -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert table(name) in page, f"the table of {name} should be:\n{table(name)}"
    assert f"(../benchmarks/results/{name})" in page


def test_the_table_of_precisions_is_that_of_the_results() -> None:
    page, report = (ROOT / "docs/gpu.md").read_text(), read(PRECISIONS) | read(PRECISIONS_FP8)
    assert "\n".join(quality_rows(report)) in page
    assert all(f"(../benchmarks/results/{name})" in page for name in (PRECISIONS, PRECISIONS_FP8))
    on_cpu = read(PRECISIONS_ON_CPU)
    bounds = {"fp16": (0.005, 50), "bf16": (0.005, 40), "fp8": (0.02, 35), "int8": (0.01, 42)}
    for name, row in (report | on_cpu).items():
        if isinstance(row, dict) and "psnr" in row:
            share, psnr = bounds[name.partition(":")[2]]
            assert row["psnr"] >= psnr, name
            assert all(abs(difference) <= share + 1e-9 for difference in row["difference"].values()), name


def test_errors_of_fp16_and_int8_are_those_of_the_results() -> None:
    page, report = (ROOT / "docs/gpu.md").read_text(), read("2026-11-30-fp16-errors-2.json")
    assert "\n".join(fp16_error_rows(report)) in page
    exact, built = (report["graphs"]["unet"][column] for column in ("last_convolution_in_fp32", "as_built"))
    added = mean(after[2] / before[2] for before, after in zip(exact, built, strict=True)) - 1
    assert f"{added:.1%} come from its last convolution" in page
    for kind in ("fp16", "bf16"):
        columns = report["demo_unet"][kind]
        added = mean(columns["as_built"]) / mean(columns["last_convolution_in_fp32"]) - 1
        assert f"adds {added:.0%} to the error of the demo UNet's prediction" in page
    assert "\n".join(int8_error_rows(read("2026-12-01-int8-full-size.json"))) in (ROOT / "docs/cpu.md").read_text()


def test_the_table_of_long_clips_is_that_of_the_results() -> None:
    page, report = (ROOT / "docs/long_clips.md").read_text(), read(LONG_CLIPS)
    assert "\n".join(long_clip_rows(report)) in page
    assert f"(../benchmarks/results/{LONG_CLIPS})" in page
    made = report["runtime"]["straight"]
    assert made["lowest_on_path"] >= 0.95
    assert made["highest_ratio"] <= 1.3
    *peaks, last = (str(length["peak_mb"]) for length in report["lengths"].values())
    assert f"{', '.join(peaks)} and {last} MB" in " ".join(page.split())


def test_every_figure_of_speed_has_its_file() -> None:
    """Results that documents cite are committed, and benchmarks.md cites the file of each of its tables."""
    cited = {link.rpartition("/")[2] for page in PAGES for link in links(page) if "benchmarks/results/" in link}
    assert {file for file, _ in ROWS.values()} <= cited
    assert all((ROOT / "benchmarks/results" / name).is_file() for name in cited)


FIDELITY = read("2026-11-30-fidelity.json")
RESIDUALS = FIDELITY["residuals by temporal norm"]
RESAMPLE, EDGES = FIDELITY["scribbles"]["resample"], FIDELITY["scribbles"]["edges"]
LEVELS = FIDELITY["levels of 255"]
DEMO = read("2026-11-28-demo-model.json")
INT8 = read(PRECISIONS_ON_CPU)["openvino:int8"]
ON_GPU = {
    name.partition(":")[2]: row["psnr"]
    for name, row in (read(PRECISIONS) | read(PRECISIONS_FP8)).items()
    if name.startswith("tensorrt:")
}
BF16 = read("2026-11-27-compare-fp32-2cores.json")["contenders"]["openvino-bf16"]["difference"]
EXPORT = read("2026-11-22-full-size-cpu.json")["export"]
ROUNDS = read("2026-11-30-export-formats.json")["rounds"]
FILES, FOLDERS = (sum(each[kind]["user_seconds"] for each in ROUNDS) for kind in ("files", "folders"))
PREVIEWS = read("2026-11-30-previews.json")["backends"]
POLLING = {name: read(name) for name in ("2026-11-26-polling-2cores.json", "2026-11-24-polling-2threads.json")}
ONE_CONNECTION = read("2026-11-30-polling-2cores.json")["poll_ms_one_connection"]
WARM_UP = read(AVX512_BF16)["contenders"]["openvino-bf16"]["starts"][0]["warm_up"]
GIB, MIB = 1024**3, 1024**2


def processor_seconds(run: dict[str, float]) -> float:
    """Of the process and of the system for it."""
    return run["user_seconds"] + run["system_seconds"]


CLAIMS = [
    # page, text that it contains
    *(
        (
            "benchmarks.md",
            f"| {name} | {row['step_ms']:.0f} ms | {row['preview_ms']:.1f} ms | {row['share']['median']:.1%} "
            f"(largest {row['share']['largest']:.1%}) |",
        )
        for name, row in PREVIEWS.items()
    ),
    ("service.md", f"waits {ONE_CONNECTION['p50']:.1f} ms (p50) and {ONE_CONNECTION['p90']:.1f} ms (p90)"),
    ("fidelity.md", f"largest difference of a pixel is {LEVELS['scribble, temporal norm clip']['max']} (scribbles)"),
    ("fidelity.md", f"and {LEVELS['rgb, temporal norm clip']['max']} (pictures) of 255"),
    ("fidelity.md", f"up to {LEVELS['rgb, temporal norm clip']['max']}, 1.4 in the mean (demo model)"),
    *(
        (
            "fidelity.md",
            f"{before}{RESIDUALS['scribble'][place]:.0%}{between}{RESIDUALS['rgb'][place]:.0%}{after} at {place}",
        )
        for place, before, between, after in (
            ("keyframes", "residuals: ", " (scribbles) and ", " (pictures)"),
            ("other frames", "keyframes, ", " and ", ""),
        )
    ),
    ("fidelity.md", f"{LEVELS['scribble, temporal norm frame, truncated']['mean']:.1f} levels in the mean, at most 1"),
    (
        "fidelity.md",
        f"{RESAMPLE['keyframes']['mean']:.1f} levels in the mean and at most {RESAMPLE['keyframes']['max']}",
    ),
    ("fidelity.md", f"clips by {RESAMPLE['frames']['mean']:.3f} and at most {RESAMPLE['frames']['max']}"),
    (
        "fidelity.md",
        f"from {EDGES['white']:.2f} to {EDGES['pale (70)']:.2f}; stretched, they are {EDGES['pale, stretched']:.2f}",
    ),
    ("fidelity.md", f"{FIDELITY['noise']['equal']:.0%} of the values have the same bits"),
    ("fidelity.md", f"the others differ by at most {FIDELITY['noise']['largest']:.1e}".replace("e-07", "e-7")),
    ("fidelity.md", f"at most {BF16['max']}, {BF16['mean']:.2f} in the mean"),
    ("fidelity.md", f"{INT8['psnr']:.1f} dB (PSNR)"),
    ("fidelity.md", "{fp16:.1f}, {bf16:.1f} and {fp8:.1f} dB (PSNR)".format(**ON_GPU)),
    ("cpu.md", f"{INT8['prompt']:.1%} have the colour and shape that was asked for, as in fp32 but for one request"),
    (
        "cpu.md",
        f"{INT8['psnr']:.1f} dB in the mean, against {DEMO['4 steps, int8']['psnr_to_first']:.1f} dB before smoothing",
    ),
    ("cpu.md", f"The lowest request has {INT8['worst_psnr']:.1f} dB"),
    ("cpu.md", f"took {WARM_UP:.0f} seconds with compilation, a new prompt after it 37"),
    ("cpu.md", f"at most {compiled_cache.MAX_BYTES // GIB} GiB"),
    ("cpu.md", f"graphs of up to {openvino.CACHED_WITH_WEIGHTS // MIB} MiB"),
    ("cpu.md", f"as make 256x{executor.DECODE_PIXELS // 256} pixels"),
    ("cpu.md", f"at least {winograd.MIN_CHANNELS} channels"),
    ("export.md", f"took {EXPORT['seconds']:.0f} seconds and {EXPORT['peak_gb']:.1f} GB"),
    ("export.md", f"{FILES / FOLDERS:.2f} times the processor time of folders"),
    ("architecture.md", f"within {load_options.KEPT_BYTES // GIB} GiB"),
    ("gpu.md", f"within `kept_bytes` ({load_options.KEPT_BYTES // GIB} GiB for each clip size)"),
    ("gpu.md", f"The graphs of the last {captures.MAX_GRAPHS} kinds are kept"),
    ("gpu.md", f"decoder ({clip_layout.ENGINE_DECODE_PIXELS // 512**2} frames at a time at 512x512)"),
    ("gpu.md", f"{['No', 'One', 'Two'][gpu_executor.MAX_SIZES]} sizes stay on the device"),
    ("gpu.md", f"scaled by {check.STRESS:.0f}"),
    ("cli.md", f"LCM steps, 1 to {request.MAX_STEPS}"),
    ("cli.md", f"guidance scale, 0 to {request.MAX_GUIDANCE:.0f}"),
    ("cli.md", f"at most {manifest.MAX_SIDE}"),
    ("cli.md", f"frames per second, 1 to {writers.MAX_FPS} (GIF: 50)"),
    *(
        ("service.md", f"{found['poll_ms']['p50']:.1f} ms | {found['poll_ms']['p99']:.0f} ms | {ratio:.2f} times")
        for found in POLLING.values()
        for ratio in [found["ratio_of_medians"]]
    ),
]


@pytest.mark.parametrize(("page", "text"), CLAIMS)
def test_claims_hold(page: str, text: str) -> None:
    assert text in " ".join((ROOT / "docs" / page).read_text().split())


def test_frames_equal_to_within_one_level_were_measured() -> None:
    for name in ("scribble", "rgb"):
        assert LEVELS[f"{name}, temporal norm frame"]["max"] == 1
    assert all(size["difference"]["max"] == 1 for size in read("2026-11-22-full-size-cpu.json")["sizes"].values())


def test_the_table_of_the_temporal_norm_is_that_of_the_results() -> None:
    cases = read("2026-11-30-temporal-norm.json")["cases"]
    header, *rows = next(rows for rows in tables((ROOT / "docs/fidelity.md").read_text()) if rows[0][0] == "request")
    for cells, (case, scopes) in zip(rows, cases.items(), strict=True):
        figures = [
            f"{row['keyframes']['mean']:.1f} dB, {row['between']['mean']:.1f} dB, {row['path']['mean']:.0%}"
            for row in scopes.values()
        ]
        assert [header, cells] == [["request", *scopes], [case, *figures]]


def test_the_model_card_has_the_figures_of_the_results() -> None:
    (rows,) = [rows for rows in tables((ROOT / "demo/trained/README.md").read_text()) if rows[0][0] == "figure"]
    fp32, int8 = DEMO["4 steps"], DEMO["4 steps, int8"] | INT8
    expected = [
        (f"{fp32['scribble_f1']:.2f}", f"{int8['scribble_f1']:.2f}"),
        (f"{fp32['free_f1']:.2f}", f"{int8['free_f1']:.2f}"),
        (f"{fp32['rgb_psnr']:.1f} dB", f"{int8['rgb_psnr']:.1f} dB"),
        (f"{fp32['prompt']:.1%}", f"{int8['prompt']:.1%}"),
        (f"{fp32['on_path']:.1%}", f"{int8['on_path']:.1%}"),
        (f"{fp32['flicker']:.2f} levels", f"{int8['flicker']:.2f} levels"),
    ]
    for cells, (first, second) in zip(rows[1:], expected, strict=False):
        assert cells[1].startswith(first) and cells[2].startswith(second), cells


def test_seconds_from_start_to_clip_are_those_measured() -> None:
    medians = read("2026-11-30-cold-start.json")["medians"]
    page = (ROOT / "docs/benchmarks.md").read_text()
    for backend, of in medians.items():
        assert f"| {backend} | {of['first']:.1f} | {of['second']:.1f} |" in page
    assert medians["openvino"]["second"] <= 2 * medians["onnxruntime"]["second"]
