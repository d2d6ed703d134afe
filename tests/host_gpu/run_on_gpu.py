"""Start every kernel once on the GPU; run by a test under compute-sanitizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernel_cases as cases
import torch
from psdiff.kernels import ops

boxes = cases.boxes_of_all_sizes(2, 12).cuda()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for ratio in (1, 2):
        maps = [level.cuda().requires_grad_() for level in cases.pyramid(2, 40, dtype=dtype)]
        ops.multilevel_roi_align_op(maps, boxes, 7, ratio, 224.0).sum().backward()
    for channels, width in ((96, 8), (128, 8), (128, 64), (256, 8), (256, 64)):
        tokens, params, norm1, norm2 = cases.conv_inputs(channels, width, 3, dtype)
        arguments = [x.cuda() for x in (tokens, params, *norm1, *norm2)]
        ops.dynamic_conv_op(*arguments, 1e-5)
        ops._cuda.dynamic_conv(*arguments, 1e-5, True)
torch.cuda.synchronize()
print("every kernel ran")
