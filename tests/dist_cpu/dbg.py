import sys
from pathlib import Path
import torch
from harness import run_ranks, tiny_hf
from test_checkpoint import *
def dump(policy, tag, rank):
    opt = policy.optimizer
    for o in getattr(opt,'chained_optimizers',[opt]):
        for g in o.optimizer.param_groups:
            print(tag, rank, type(o).__name__, {k:v for k,v in g.items() if k!='params'}, len(g['params']), flush=True)
        for n,p in policy.model.named_parameters():
            m = getattr(p,'main_param',p); m = p if m is None else m
            st=o.optimizer.state.get(m,{})
            if 'embedding' in n or 'norm' in n: print(tag, rank,n,{k:float(v.float().norm()) for k,v in st.items()}, flush=True)
def case(rank, c):
    action, folder, layout, distributed, out = c
    policy, context = make_policy(folder, layout, distributed_optimizer=distributed)
    store = CheckpointStore(out, keep=1, warn=print)
    if action == "save":
        train(policy, context, 2)
        dump(policy,'save',rank)
        store.save(2, model=policy.model, optimizer=policy.optimizer, state={"step": 2})
    else:
        load_checkpoint(store.newest(), model=policy.model, optimizer=policy.optimizer)
        dump(policy,'load',rank)
        print(train(policy, context, 2))
    if action=='save': print(train(policy, context, 2))
if __name__=='__main__':
    import tempfile
    t=Path(tempfile.mkdtemp()); folder=tiny_hf(t/'hf','qwen2'); out=t/'c'; out.mkdir()
    run_ranks(case, 2, [("save",folder,(2,1,1),sys.argv[1]=='1',out),("load",folder,(1,1,1),sys.argv[1]=='1',out)])
