"""`make test-stores` installs what tests need; there a test skipped for want of it is a failure."""

import os

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    if report.skipped and os.environ.get("KVTC_ALL_INSTALLED") and "not installed" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = str(report.longrepr)
    return report
