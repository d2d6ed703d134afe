"""Bugs put into the kernels, each of which the checks must catch; a script, because some of them crash.

python tests/kernel_bugs.py FOLDER builds all changed copies there, in one go, and prints whether the checks caught
each. Copies without a bug show that it is the bug which is caught.
"""

import os
import re
import sys
from pathlib import Path

import kernel_cases as cases
import kernels_on_host as host
import test_kernels_frame as frame_tests
import torch

ROI, CONV, STEP, LETTERBOX = "roi_align.cuh", "dynamic_conv.cuh", "ddim_step.cuh", "letterbox.cuh"


def roi_align_checks(kernels):
    for seed in (0, 7, 8):
        cases.check_roi_align(kernels, dtype=torch.float32, ratio=2, count=20, seed=seed)


def gradient_checks(kernels):
    cases.check_roi_align_grad(kernels, seed=5)


def conv_checks(kernels, channels=128):
    for seed in (0, 7, 8, 9):
        for mean_only in (False, True):
            settings = {"regions": 2, "seed": seed, "mean_only": mean_only}
            cases.check_dynamic_conv(kernels, channels=channels, width=64, dtype=torch.float16, **settings)


def wide_conv_checks(kernels):
    """The size at which Y lies over the slot of the last stage."""
    conv_checks(kernels, channels=256)


def step_checks(kernels):
    frame_tests.test_the_ddim_step_is_as_exact_as_pytorch(kernels, torch.float32, 3, 256)
    for times in frame_tests.STEPS:
        frame_tests.test_the_ddim_step_is_as_exact_at_every_noise(kernels, times)


def nan_checks(kernels):
    frame_tests.test_what_is_no_number_stays_none(kernels)


def letterbox_checks(kernels):
    for frame, canvas in (((97, 131), (64, 40)), ((40, 30), (160, 96))):
        frame_tests.test_a_frame_lies_on_the_canvas_as_opencv_places_it(kernels, frame, canvas)
    frame_tests.test_nv12_of_an_odd_size_takes_the_chroma_of_each_block(kernels)
    frame_tests.test_nv12_rows_may_be_longer_than_their_pixels(kernels)


# The lines of entries.cu that make the kernels of a file.
ENTRIES = {
    ROI: "PSD_ROI_ALIGN",
    CONV: "PSD_EACH_DYNAMIC_CONV",
    STEP: "PSD_DDIM_STEP",
    LETTERBOX: "PSD_LETTERBOX",
}

# Name: file, text, what stands there instead at each place, who must notice.
BUGS = {
    "a level too fine": (ROI, "(side >= 0.5f *", "(side >= 0.6f *", roi_align_checks),
    "the last row reads the next": (ROI, "low >= size - 1", "low >= size", roi_align_checks),
    "no barrier after the samples": (
        ROI,
        "  __syncthreads();\n  return level;",
        "  return level;",
        roi_align_checks,
    ),
    "x and y exchanged": (ROI, "axis[cell / kPool *", "axis[cell % kPool *", roi_align_checks),
    "images exchanged": (ROI, "blockIdx.x / args.boxes", "blockIdx.x % args.boxes", roi_align_checks),
    "a corner too few": (ROI, "number < 4 *", "number < 3 *", gradient_checks),
    "a gradient without its weight": (ROI, "corner.weight * grad[i]", "grad[i]", gradient_checks),
    "no barrier before a stage is read": (CONV, "next.\n  __syncthreads();", "next.", conv_checks),
    "a stage is read before it came": (CONV, "Plan::kPending>", "Plan::kPending + 1>", conv_checks),
    "a copy into the slot that is read": (CONV, "slots + ahead %", "slots + stage %", conv_checks),
    "rows of P1 in the order of memory": (CONV, "= place_of_row(row)", "= row", conv_checks),
    "chunks read where they do not lie": (CONV, "<kChunks>(row)", "<kChunks>(row + 1)", conv_checks),
    "the mean of the other row": (CONV, "] - mean[half], right", "] - mean[0], right", conv_checks),
    "no barrier before Y takes the slots": (CONV, "hold Y.\n  __syncthreads();", "hold Y.", wide_conv_checks),
    "rows leave before they are staged": (
        CONV,
        "__syncwarp();\n  const int valid",
        "const int valid",
        conv_checks,
    ),
    "padded rows count for the mean": (CONV, "g + 8 < kCells;", "g + 8 < 64;", conv_checks),
    "the mean before its sums": (CONV, "__syncthreads();\n  for (int pair", "for (int pair", conv_checks),
    "hidden columns exchanged": (CONV, "[tile % 2 * 2] =", "[2 - tile % 2 * 2] =", conv_checks),
    "one level for all images": (STEP, "/ args.proposals_per_image * 4", "* 0", step_checks),
    "half of the embedding": (STEP, "first += 4 * kWarp", "first += 8 * kWarp", step_checks),
    "a side may be zero": (STEP, ", kLeastSide)", ", 0.f)", step_checks),
    "whole cells only": (
        LETTERBOX,
        "return fmaxf(fminf(float(cell)",
        "return 1.f; fmaxf(fminf(float(cell)",
        letterbox_checks,
    ),
    "half a pixel off": (LETTERBOX, "(x + 0.5f) * scale_x - 0.5f", "x * scale_x", letterbox_checks),
    "chroma of the column beside": (LETTERBOX, "x / 2 * 2;", "(x + 1) / 2 * 2;", letterbox_checks),
    "noise that is not scaled": (STEP, "x_0) / level.noise", "x_0)", step_checks),
    "a NaN becomes a limit": (STEP, "return x < limit ? limit : x;", "return fmaxf(x, limit);", nan_checks),
    "rows of chroma without a pitch": (
        LETTERBOX,
        "* args.chroma_pitch",
        "* args.first_pitch",
        letterbox_checks,
    ),
}


CONTROLS = {
    f"no bug, {checks.__name__}": (file, "psdiff", "psdiff", checks)
    for file, _, _, checks in {bug[3]: bug for bug in BUGS.values()}.values()
}


def text_of(file, changed, included):
    """A file of csrc with the files that it includes in their places, each once; changed: texts by name."""
    included.add(file)
    text = changed.get(file) or (host.CSRC / file).read_text(encoding="utf-8")

    def content(match):
        if match[1] in included or not (host.CSRC / match[1]).is_file():
            return ""
        return text_of(match[1], changed, included)

    return re.sub(r'^#include "(.*)"$', content, text.replace("#pragma once", ""), flags=re.MULTILINE)


def changed_copy(prefix, name):
    """The kernels of one file with the bug, in a namespace, and the prefix before the names of the entries."""
    file, old, new, checks = (BUGS | CONTROLS)[name]
    source = (host.CSRC / file).read_text(encoding="utf-8")
    if old not in source:
        raise SystemExit(f"{name}: the text {old!r} is no longer in {file}")
    text = text_of("entries.cu", {file: source.replace(old, new)}, set())
    others = "|".join(set(ENTRIES.values()) - {ENTRIES[file]})
    text = re.sub(rf"^(?:{others})\(.*$", "", text, flags=re.MULTILINE)
    text = text.replace("PSD_ENTRY(psdiff_", f"PSD_ENTRY({prefix}psdiff_")
    channels = 256 if checks is wide_conv_checks else 128
    sizes = f"#define PSD_CHANNELS {channels}\n#define PSD_WIDTH 64\n"
    entries = (host.CSRC / "entries.cu").read_text(encoding="utf-8")
    end = "".join(
        f"#undef {macro}\n" for macro in re.findall(r"^#define (\w+)", sizes + entries, re.MULTILINE)
    )
    return f"{sizes}namespace {prefix} {{\n{text}\n}}\n{end}"


def is_caught(checks, kernels):
    """Run the checks in a process of their own: a crash counts as caught."""
    child = os.fork()
    if child == 0:
        try:
            checks(kernels)
        except (AssertionError, RuntimeError):
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main(folder):
    """Compiling all copies at once reads the headers of C++ once, which takes most of the time for one copy."""
    prefixes = {name: f"bug{number}_" for number, name in enumerate(BUGS | CONTROLS)}
    copies = [changed_copy(prefix, name) for name, prefix in prefixes.items()]
    (folder / "entries.cu").write_text('#include "device_on_host.h"\n' + "".join(copies), encoding="utf-8")
    library = host.build(folder, folder, "-O1", "-Wno-error")
    for name, prefix in prefixes.items():
        checks = (BUGS | CONTROLS)[name][3]
        outcome = "caught" if is_caught(checks, host.HostKernels(library, prefix)) else "missed"
        print(f"{name}: {outcome}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
