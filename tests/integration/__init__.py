"""Tests that start the real daemon as a process, with real executors as its children."""
