"""Tests of GenVM Manager; one module for each section of the file."""
