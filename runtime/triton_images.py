"""Images for a Triton server: in memory that client and server share where that is possible, else in the request."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count()


class SharedImages:
    """One region of shared memory that grows with the batch; its name is unique to the process and the object."""

    def __init__(self, client: Any, error: Any, wanted: bool) -> None:  # noqa: ANN401 - types of the library
        """client: an InferenceServerClient; error: what it raises. wanted: whether to try shared memory at all."""
        self._client, self._error = client, error
        self._is_wanted = wanted
        self._name = f"psdiff-{os.getpid()}-{next(_NUMBERS)}"
        self._region: Any = None
        self._num_bytes = 0
        self._is_registered = False

    @property
    def is_shared(self) -> bool:
        """Whether images go through shared memory now."""
        return self._is_registered

    def inputs(self, grpc: Any, images: Sequence[NDArray[np.uint8]]) -> list[Any]:  # noqa: ANN401
        """The images, each (1, H, W, 3), as inputs of requests. They are overwritten by the next call."""
        tensors = [grpc.InferInput("image", list(image.shape), "UINT8") for image in images]
        if not self._is_wanted or not self._has_room(sum(image.nbytes for image in images)):
            for tensor, image in zip(tensors, images, strict=True):
                tensor.set_data_from_numpy(image)
            return tensors
        from tritonclient.utils.shared_memory import set_shared_memory_region

        offset = 0
        for tensor, image in zip(tensors, images, strict=True):
            set_shared_memory_region(self._region, [image], offset)
            tensor.set_shared_memory(self._name, image.nbytes, offset)
            offset += image.nbytes
        return tensors

    def forget(self) -> None:
        """Register again before the next images: the server that knew the region may be gone."""
        self._is_registered = False

    def close(self) -> None:
        """Unregister and remove the region; a second call does nothing."""
        if self._region is None:
            return
        from tritonclient.utils.shared_memory import destroy_shared_memory_region

        self._unregister()
        destroy_shared_memory_region(self._region)
        self._region, self._num_bytes = None, 0

    def _has_room(self, num_bytes: int) -> bool:
        """Make the region large enough and known to the server; False, from now on, where it allows none."""
        from tritonclient.utils.shared_memory import SharedMemoryException, create_shared_memory_region

        if self._is_registered and num_bytes <= self._num_bytes:
            return True
        try:
            if num_bytes > self._num_bytes:
                self.close()
                self._region = create_shared_memory_region(self._name, f"/{self._name}", num_bytes)
                self._num_bytes = num_bytes
            self._unregister()
            self._client.register_system_shared_memory(self._name, f"/{self._name}", self._num_bytes)
        except (self._error, SharedMemoryException) as error:
            if "UNAVAILABLE" in str(error):
                raise
            logger.info("no shared memory with the server (%s): images travel in the requests", error)
            self._is_wanted = False
            self.close()
            return False
        self._is_registered = True
        return True

    def _unregister(self) -> None:
        self._is_registered = False
        try:
            self._client.unregister_system_shared_memory(self._name)
        except self._error:
            return
