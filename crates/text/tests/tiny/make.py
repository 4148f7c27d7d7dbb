"""Makes tokenizer.json beside this file: small, of Gemma's kind (layout of ids, byte fallback, added tokens)."""
import collections
import json
import pathlib

S=lambda i,c,sp: dict(id=i,content=c,single_word=False,lstrip=False,rstrip=False,normalized=False,special=sp)
vocab={}
def add(t):
    if t not in vocab: vocab[t]=len(vocab)
    return vocab[t]
added=[]
for t in ["<pad>","<eos>","<bos>","<unk>"]: added.append(S(add(t),t,True))
for t in ["<mask>","[@BOS@]"]: added.append(S(add(t),t,False))
for i in range(100): t=f"<unused{i}>"; added.append(S(add(t),t,False))
for t in ["<start_of_turn>","<end_of_turn>"]: added.append(S(add(t),t,True))
for n in range(1,31): t="\n"*n; added.append(S(add(t),t,False))
for n in range(2,32): t="▁"*n; added.append(S(add(t),t,False))
for t in ["<table>","<h1>","</h1>","<b>","</b>"]: added.append(S(add(t),t,False))
for b in range(256): add(f"<0x{b:02X}>")
corpus="""the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun while hello world hello there
user model system you are a helpful assistant answer in one word please what is the capital of france the answer is paris
it was the best of times it was the worst of times it was the age of wisdom start of turn end of turn being nothing
größe über straße müde наука и жизнь это хорошо 東京 日本 """.split()
for ch in sorted(set("".join(corpus))|set(map(chr,range(33,127)))|{"▁"}): add(ch)
words=collections.Counter("▁"+w for w in corpus)
split={w:list(w) for w in words}
merges=[]
for _ in range(260):
    pairs=collections.Counter()
    for w,n in words.items():
        s=split[w]
        for a,b in zip(s,s[1:]): pairs[a,b]+=n
    if not pairs: break
    (a,b),_n=max(pairs.items(), key=lambda kv:(kv[1],kv[0]))
    merges.append([a,b]); add(a+b)
    for w in words:
        s=split[w]; o=[]; i=0
        while i<len(s):
            if i+1<len(s) and s[i]==a and s[i+1]==b: o.append(a+b); i+=2
            else: o.append(s[i]); i+=1
        split[w]=o
# As in converted SentencePiece vocabularies, merges can spell a control token; text from a client must not.
for a,b in [["<","b"],["o","s"],["os",">"],["<b","os>"]]:
    if a+b not in vocab: add(a+b)
    if [a,b] not in merges: merges.append([a,b])
json.dump(dict(version="1.0",truncation=None,padding=None,added_tokens=added,
 normalizer=dict(type="Replace",pattern=dict(String=" "),content="▁"),
 pre_tokenizer=dict(type="Split",pattern=dict(String=" "),behavior="MergedWithPrevious",invert=False),
 post_processor=dict(type="TemplateProcessing",single=[dict(SpecialToken=dict(id="<bos>",type_id=0)),dict(Sequence=dict(id="A",type_id=0))],
  pair=[dict(SpecialToken=dict(id="<bos>",type_id=0)),dict(Sequence=dict(id="A",type_id=0)),dict(SpecialToken=dict(id="<bos>",type_id=1)),dict(Sequence=dict(id="B",type_id=1))],
  special_tokens={"<bos>":dict(id="<bos>",ids=[2],tokens=["<bos>"])}),
 decoder=dict(type="Sequence",decoders=[dict(type="Replace",pattern=dict(String="▁"),content=" "),dict(type="ByteFallback"),dict(type="Fuse")]),
 model=dict(type="BPE",dropout=None,unk_token="<unk>",continuing_subword_prefix=None,end_of_word_suffix=None,fuse_unk=True,byte_fallback=True,ignore_merges=False,vocab=vocab,merges=merges)),
 open(pathlib.Path(__file__).with_name("tokenizer.json"),"w",encoding="utf-8"),ensure_ascii=False,separators=(",",":"))
