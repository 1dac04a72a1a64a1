// (in the making)
