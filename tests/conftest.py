import os, signal

os.environ.setdefault("MPLBACKEND", "Agg")
for name in [k for k in os.environ if k.startswith("SSL_NB_")]:
    del os.environ[name]  # the developer's own settings stay out
# what a shell leaves to a job in the background; tests of Ctrl-C need the usual answer
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
