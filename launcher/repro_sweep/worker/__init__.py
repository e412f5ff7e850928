"""Workers: the agent that holds slots, the zygote that forks trials, and what user code sees inside of one."""
