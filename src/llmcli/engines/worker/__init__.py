"""The warm worker: a process in the background that keeps models loaded, and runs the jobs of later calls.

client   a call's side: reaches the worker, starts one, gives it a job; imports nothing heavy
wire     what goes between them, and where they meet
server   the worker's side: a thread for each call, and the end when nobody has called for a while
turns    whose turn it is to compute
warm     the models, and which of them gives way
"""
