"""A results database that another process serves: the same studies, over HTTP."""
