package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/internal/backend"
)

const (
	// watchWait is how long Consul holds a query when nothing changes. Consul adds up to a sixteenth, which stays
	// under the 60 s after which most proxies cut the connection. The client waits longer than that, and than the
	// election of a leader.
	watchWait    = 55 * time.Second
	watchTimeout = watchWait*17/16 + 10*time.Second
	// maxLastContact is how long a server may have had no contact with the leader before its answers are
	// distrusted.
	maxLastContact = 10 * time.Second
	// largeAnswer is the size, in bytes, from which on a watch pauses after an answer, and longestRest bounds the pause.
	// When one of 10,000 reports changes, the answer has all of them, 9 MB.
	largeAnswer = 512 << 10
	longestRest = 5 * time.Second
	// unavailableLimit is the longest average pause between tries to reach a store that is away. A pause is at
	// most twice that: with dialTimeout, a watch is back at most 11 s after its store.
	unavailableLimit = 3 * time.Second
	// tooMuchLimit is the longest average pause between tries to read a prefix that has too much below it: each try
	// reads up to kv.MaxListBytes.
	tooMuchLimit = 15 * time.Second
)

// Watch reads from the leader. If the answer has an entry or the folder key, Watch then blocks on any server, which
// spares the leader and survives its loss. If the answer has neither, Watch polls the leader. A blocking answer that
// looks like a step back is not believed: Watch starts again with a read from the leader, as after every error.
func (s *Store) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	if err := backend.CheckPrefix(prefix); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	v := backend.NewViewer(s.prefix+prefix, s.log, f)
	unavailable := wait.NewBackoff(50*time.Millisecond, unavailableLimit)
	denied := wait.NewBackoff(100*time.Millisecond, 10*time.Second)
	tooMuch := wait.NewBackoff(time.Second, tooMuchLimit)
	// Answers that come at once without any change must not cause a busy loop.
	idle := wait.NewBackoff(5*time.Millisecond, 250*time.Millisecond)
	for {
		l, err := s.listConsistent(ctx, prefix)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		pause := unavailable
		switch {
		case err == nil && l.showsNothing():
			// Blocking would wake on every write anywhere, so poll now and then instead.
			pause = denied
			s.adopt(v, prefix, l)
		case err == nil:
			denied.Reset()
			tooMuch.Reset()
			if !slices.EqualFunc(v.View().Entries, l.entries, backend.SameEntry) {
				idle.Reset()
			}
			s.adopt(v, prefix, l)
			began := time.Now()
			err := s.follow(ctx, prefix, v, l, idle)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// A single successful read doesn't end an outage in which blocking queries fail at once.
			if err == nil || time.Since(began) > unavailableLimit {
				unavailable.Reset()
			}
			if err == nil {
				continue
			}
			v.Fail(err)
		case errors.Is(err, kv.ErrDenied):
			pause = denied
			v.Fail(err)
		case errors.Is(err, kv.ErrTooLarge):
			pause = tooMuch
			v.Fail(err)
		default:
			v.Fail(err)
		}
		if err := pause.Wait(ctx); err != nil {
			return err
		}
	}
}

// adopt puts an answer into the view. Keys that it lacks are absent only if it has the folder key and isn't filtered.
func (s *Store) adopt(v *backend.Viewer, prefix string, l listing) {
	v.SetFolders(l.folders)
	if l.folder && !l.filtered {
		v.Set(l.entries)
		return
	}
	v.Merge(l.entries, s.absenceError(prefix, l))
}

// showsNothing reports whether the answer shows nothing that a blocking query could wait on: no
// folder key, and no entry.
func (l listing) showsNothing() bool { return !l.folder && len(l.entries) == 0 }

// listConsistent reads from the leader, without blocking: see consistent.
func (s *Store) listConsistent(ctx context.Context, prefix string) (listing, error) {
	return s.read(ctx, prefix, api.QueryOptions{RequireConsistent: true}, requestTimeout)
}

// follow blocks for changes after an adopted answer, and adopts them. It returns the error of a read that failed, or of
// a server that may be behind. Nil means that an answer has to be confirmed by the leader.
func (s *Store) follow(ctx context.Context, prefix string, v *backend.Viewer, last listing, idle *wait.Backoff) error {
	for {
		index := max(last.meta.LastIndex, 1)
		asked := time.Now()
		answered := asked
		l, err := s.read(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
			GotFirstResponseByte: func() { answered = time.Now() },
		}), prefix, api.QueryOptions{AllowStale: true, WaitIndex: index, WaitTime: watchWait}, watchTimeout)
		if err != nil {
			return err
		}
		if !trusted(l.meta) {
			if !l.meta.KnownLeader {
				return fmt.Errorf("list %s: the Consul server knows no leader: %w", prefix, kv.ErrUnavailable)
			}
			return fmt.Errorf("list %s: the Consul server had its last contact with the leader %v ago: %w", prefix,
				l.meta.LastContact, kv.ErrUnavailable)
		}
		took := time.Since(asked)
		if nextIndex(index, l.meta.LastIndex, took, watchWait) == 0 || l.folder != last.folder || l.filtered != last.filtered ||
			l.showsNothing() ||
			regressed(v.View().Entries, l.entries) {
			return idle.Wait(ctx)
		}
		if slices.EqualFunc(last.entries, l.entries, backend.SameEntry) && slices.Equal(last.folders, l.folders) &&
			took < watchWait {
			if err := idle.Wait(ctx); err != nil {
				return err
			}
		} else {
			idle.Reset()
			s.adopt(v, prefix, l)
			if l.size() >= largeAnswer {
				if err := wait.For(ctx, wait.Rest(time.Since(answered), longestRest)); err != nil {
					return err
				}
			}
		}
		last = l
	}
}

// size returns the total size of the entries' keys and values, in bytes.
func (l listing) size() (sum int) {
	for _, e := range l.entries {
		sum += len(e.Key) + len(e.Value)
	}
	return sum
}

// nextIndex returns the index to wait on after an answer. If the answer is doubtful, it returns 0, with which the next
// read doesn't wait. After the restore of a snapshot the index goes back, or stays the same although the wait had not
// ended.
func nextIndex(sent, got uint64, took, maxWait time.Duration) uint64 {
	if sent > 0 && (got < sent || got == sent && took < maxWait) {
		return 0
	}
	return max(got, 1) // 0 wouldn't wait
}

// regressed reports whether a key of old is missing or older in now, both sorted.
func regressed(old, now []kv.Entry) bool {
	for _, e := range old {
		for len(now) > 0 && now[0].Key < e.Key {
			now = now[1:]
		}
		if len(now) == 0 || now[0].Key != e.Key || now[0].Version < e.Version {
			return true
		}
	}
	return false
}
