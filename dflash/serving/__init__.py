"""Servers of other projects, measured over HTTP: the target alone, then with the draft.

options     what a user says: which servers, started how, with which draft
deployment  what that comes to: the servers of a case, each started or running already
draft       a draft is checked before a server gets it
server      a process that is started, waited for, and always ended
adapters    all that differs between kinds of servers
connection  HTTP to one server, bounded in time and bytes, without secrets in what it says
client      one prompt, one completion
acceptance  what a server tells of acceptance, in our definitions
conventions which of them a server breaks: its acceptance beside ours, and beside ours with each one broken
run         a case: rounds on both servers, completions compared, figures
results     the file of a case, as the benchmarks write it
"""
