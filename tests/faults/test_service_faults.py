"""Faults 7, 12, 22, 24 and 25: the service's own surroundings."""

import pytest
from watched import films, survives, watch

__all__ = ["films", "watch"]


def test_07_a_decoder_that_crashes_takes_its_own_cameras_only(watch):
    site = watch("gate", "hall", isolation="process")
    assert len(site.service.ingest_workers()) == 2
    assert survives(7, site) < 5


def test_12_under_overload_k_falls_and_rises_and_nobody_is_left_out(watch):
    site = watch("gate", "hall")
    survives(12, site)
    assert {each.steps for each in site.seen("gate")} >= {1, 4}


@pytest.mark.slow
def test_22_a_service_that_is_asked_to_end_does_so_in_order(watch, shipped):
    assert survives(22, watch("gate")) <= 10


def test_24_cameras_that_go_and_come_leave_nothing_behind(watch):
    survives(24, watch())


def test_25_a_site_is_edited_while_it_runs(watch):
    survives(25, watch())
