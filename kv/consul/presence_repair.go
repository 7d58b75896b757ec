package consul

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments/wait"
	"kedge/kv"
)

// watchEntries renews a session that has a TTL. It repairs the entries when the session or one of them is lost. That
// happens if the node was taken for dead for a moment, or a snapshot was restored.
func (p *presence) watchEntries() {
	defer close(p.done)
	trouble := wait.NewBackoff(100*time.Millisecond, unavailableLimit)
	for {
		p.putting.Lock()
		session, renew, idle := p.session, p.hasTTL, len(p.held) == 0
		watched, taken := "", ""
		for key := range p.held {
			of := &watched
			if p.taken[key] {
				of = &taken
			}
			if *of == "" || key < *of {
				*of = key
			}
		}
		p.putting.Unlock()
		if idle {
			select {
			case <-p.wake.C():
				continue
			case <-p.ctx.Done():
				return
			}
		}
		var err error
		if session != "" && watched != "" {
			var holds bool
			if holds, err = p.watchEntry(session, watched, renew); holds && p.holdsAll(session) {
				trouble.Reset()
				continue
			}
		} else if watched == "" && taken != "" { // another process has taken all entries
			err = p.watchTaken(taken)
		}
		if err == nil {
			err = p.repair()
		}
		pause := 50 * time.Millisecond // sessions that come and go must not cause a busy loop
		if err == nil {
			trouble.Reset()
		} else {
			pause = trouble.Next()
		}
		if wait.For(p.ctx, pause) != nil {
			return
		}
	}
}

// watchEntry waits until the value or the holder of an entry differs from what was put, or for presenceCheckAfter or
// somewhat longer. holds reports whether both value and holder are certainly as they were put. The reads are stale
// ones: repair confirms a difference.
func (p *presence) watchEntry(session, key string, renew bool) (holds bool, err error) {
	s := p.store
	most := min(watchWait, s.presenceCheckAfter)
	if renew {
		most = min(most, presenceTTL/3)
	}
	var index uint64
	idle := wait.NewBackoff(5*time.Millisecond, time.Second)
	for end := time.Now().Add(s.presenceCheckAfter); time.Now().Before(end); {
		if renew {
			if err := s.renewSession(p.ctx, session, requestTimeout); errors.Is(err, kv.ErrNotFound) {
				return false, nil
			} else if err != nil {
				return false, err
			}
		}
		asked := time.Now()
		holds = false
		err := s.do(p.ctx, "look at "+key, watchTimeout, func(q *api.QueryOptions) error {
			q.AllowStale, q.WaitIndex, q.WaitTime = true, index, most
			pair, meta, err := s.client.KV().Get(s.prefix+key, q)
			if err == nil {
				holds = trusted(meta) && pair != nil && pair.Session == session && p.isLastPut(key, pair.Value)
				index = nextIndex(index, meta.LastIndex, time.Since(asked), most)
			}
			return err
		})
		if err != nil || !holds {
			return false, err
		}
		if index == 0 {
			return false, wait.For(p.ctx, time.Second) // a restore may have kept the session and changed its entries
		}
		if err := idle.Wait(p.ctx); err != nil {
			return false, err
		}
	}
	return holds, nil
}

// trusted reports whether a server that answered a stale read is in contact with its leader.
func trusted(meta *api.QueryMeta) bool { return meta.KnownLeader && meta.LastContact <= maxLastContact }

// holdsAll reports whether a server shows each entry as it was put and held by the session, and no entry is taken. If
// so, the session is alive, and the leader need not be asked. It returns false if that is in doubt.
func (p *presence) holdsAll(session string) bool {
	p.putting.Lock()
	keys := slices.Collect(maps.Keys(p.held))
	doubt := p.session != session || len(p.taken) > 0
	p.putting.Unlock()
	for _, key := range keys {
		if doubt {
			break
		}
		err := p.store.do(p.ctx, "look at "+key, requestTimeout, func(q *api.QueryOptions) error {
			q.AllowStale = true
			pair, meta, err := p.store.client.KV().Get(p.store.prefix+key, q)
			doubt = err != nil || !trusted(meta) || pair == nil || pair.Session != session || !p.isLastPut(key, pair.Value)
			return err
		})
		doubt = doubt || err != nil
	}
	return !doubt
}

// watchTaken waits until an entry that another process had taken changes or has no holder, or for takenPoll. When a
// second agent of this name ends, its entries are gone, and the first agent has to put them again soon.
func (p *presence) watchTaken(key string) error {
	var index uint64
	for range 2 { // the current state, and its next change
		asked, free := time.Now(), false
		err := p.store.do(p.ctx, "look at "+key, watchTimeout, func(q *api.QueryOptions) error {
			q.AllowStale, q.WaitIndex, q.WaitTime = true, index, takenPoll
			pair, meta, err := p.store.client.KV().Get(p.store.prefix+key, q)
			if err == nil {
				free = pair == nil || pair.Session == ""
				index = nextIndex(index, meta.LastIndex, time.Since(asked), takenPoll)
			}
			return err
		})
		if err != nil || free {
			return err
		}
		if index == 0 {
			return wait.For(p.ctx, time.Second)
		}
	}
	return nil
}

// isLastPut reports whether value is the one that the presence keeps at key.
func (p *presence) isLastPut(key string, value []byte) bool {
	p.putting.Lock()
	defer p.putting.Unlock()
	return bytes.Equal(p.held[key], value)
}

// repair puts each entry again that this presence's session doesn't hold as it was put. An entry that a later process
// of this node has taken stays with that process as long as the process lives. Afterwards repair puts the entry again:
// a node whose agent was started twice must not be gone when the second agent ends. If the session holds an entry with
// a value other than the last that was tried, readers see the node's old state, as after a restored snapshot. Then
// repair opens another session, and each entry has to join again.
func (p *presence) repair() error {
	p.putting.Lock()
	defer p.putting.Unlock()
	if len(p.held) == 0 {
		return nil
	}
	if p.session != "" {
		info, _, err := p.store.sessionInfo(p.ctx, p.session, api.QueryOptions{RequireConsistent: true}, requestTimeout)
		if err != nil {
			return err
		}
		if info == nil {
			p.store.log.Warn("the session of this node's entries is gone: making another", "name", p.name)
			p.lose()
		}
	}
	before := "" // the session to replace; empty: the session stays
	defer func() {
		if before != "" {
			p.store.destroySession(before)
		}
	}()
	for _, key := range slices.Sorted(maps.Keys(p.held)) {
		e, err := p.store.Get(p.ctx, key)
		switch {
		case err != nil && !errors.Is(err, kv.ErrNotFound):
			return err
		case e.Session != "" && e.Session == p.session && bytes.Equal(e.Value, p.held[key]):
			continue
		case e.Session != "" && e.Session == p.session && !bytes.Equal(e.Value, p.tried[key]):
			p.store.log.Warn("the store has an older value of this node's entry, as after the restore of a snapshot: "+
				"writing the current one again", "name", p.name, "key", key)
			before = p.session
			p.lose()
		case e.Session != "" && !p.mine[e.Session]: // a restored snapshot may have brought back a session in mine
			if !p.taken[key] {
				p.store.log.Warn("another process has taken this node's entry: if two agents have the same name, rename one",
					"key", key)
			}
			p.taken[key] = true
			continue
		}
		if err := p.put(p.ctx, key, p.held[key]); err != nil {
			return err
		}
		delete(p.taken, key)
	}
	return nil
}
