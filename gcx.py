import time,subprocess
for c in ('import torch','import gc; gc.disable(); import torch','import gc; gc.disable(); import torch; gc.freeze()','import gc; gc.disable(); import torch,os; os._exit(0)','import pyarrow,numba,pandas','import gc; gc.disable(); import pyarrow,numba,pandas; gc.freeze()'):
  ts=[]
  for i in range(5):
    t=time.time(); subprocess.run(['python','-c',c],check=True); ts.append(time.time()-t)
  print(c,min(ts))
