"""Tests of mpsearch."""
