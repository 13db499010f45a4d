"""From the events of all ranks to one trace, and to a picture of it."""
