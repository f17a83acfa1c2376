"""Servers of other projects, measured over HTTP: the target alone, then with the draft.

plan       what is measured: which servers, started how, with which draft
draft      a draft is checked before a server gets it
server     a process that is started, waited for, and always ended
adapters   which command line starts which server, and what it can't do
client     one request, one answer
acceptance what a server tells of acceptance, in our definitions
run        a case: rounds on both servers, texts compared, figures
results    the file of a case, as the benchmarks write it
"""
