"""Drives collectives beside the computation; which algorithm they follow is not known here."""
