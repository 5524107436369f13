"""A data set looked at before a day of training is spent on it: what training would refuse, drop or never learn, and why."""
