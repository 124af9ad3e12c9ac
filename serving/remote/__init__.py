"""HTTP, tokenizing, templates and detokenization in processes of their own, beside the engine's: --api_processes.

wire.py is the language between them; hub.py speaks it for the engine, client.py for an API process; worker.py is the
API process's program, supervisor.py starts and ends them. See docs/adr/0020.
"""
