"""The worker: a background process that keeps models loaded and runs the jobs of later calls.

protocol     messages, and the socket where a call and the worker meet
client       the side of a call: connects, starts a worker, sends a job; imports nothing heavy
server       the side of the worker: a thread for each call
device_lock  which job computes
"""
