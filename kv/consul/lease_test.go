package consul_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// The holder is stopped, another takes over, and the holder goes on: it writes nothing any more.
func TestLeaseOfSleeper(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/", "desired/")
	s := c.Open("")
	sleeper := kvtest.StartChild(t, "lease", c.Addr())
	sleeper.Expect(t, "held")
	kvtest.Await(t, "the child's first write", func() error { _, err := s.Get(t.Context(), "desired/k"); return err })
	sleeper.Signal(t, syscall.SIGSTOP)
	start := time.Now()
	lease, err := s.Lease(t.Context(), "mirror/lease", "second", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("taken over after %v", took)
	if took > 15*time.Second {
		t.Errorf("taken over after %v: for the heartbeat's 5 s there was a lock-delay, or the session's time, to wait for", took)
	}
	if err := s.Commit(t.Context(), lease, kv.Put("desired/k", []byte("second"))); err != nil {
		t.Fatal(err)
	}
	sleeper.Signal(t, syscall.SIGCONT)
	sleeper.Expect(t, "refused")
	sleeper.Expect(t, "ended: "+kv.ErrLeaseLost.Error())
	if e, err := s.Get(t.Context(), "desired/k"); err != nil || string(e.Value) != "second" {
		t.Fatalf("the sleeper wrote: %+v, %v", e, err)
	}
	if err := lease.Context().Err(); err != nil {
		t.Fatalf("the second holder's lease ended: %v", err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The holder of a lease is a service in the catalog, for as long as it holds it.
func TestLeaseIsAService(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	folders(t, c, "mirror/")
	s := c.Open(c.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: c.Servers[0].Name})))
	holders := func() int {
		t.Helper()
		services, _, err := c.Client().Health().Service(consul.LeaseService, "", true, nil)
		if err != nil {
			t.Fatal(err)
		}
		return len(services)
	}
	lease, err := s.Lease(t.Context(), kv.MirrorLease, "mirror-1", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if n := holders(); n != 1 {
		t.Errorf("%d healthy services while the lease is held", n)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	kvtest.Await(t, "the service is gone", func() error {
		if n := holders(); n != 0 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
}

// A Consul agent that is away for a moment doesn't cost a lease its heartbeat for its whole term. An agent that never
// takes the service, as with a full disk, doesn't cost the lease.
func TestLeaseAsksAgainForHeartbeat(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/")
	for name, failing := range map[string]int64{"a moment": 2, "for ever": math.MaxInt64} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFront(t, c)
			var refused atomic.Int64
			f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
				return strings.HasSuffix(r.URL.Path, "/agent/service/register") && refused.Add(1) <= failing && status(500)(w, r)
			})
			s := open(t, consul.Config{Client: f.config("")})
			key := "mirror/lease-" + strings.ReplaceAll(name, " ", "-")
			lease, err := s.Lease(t.Context(), key, "mirror-1", 15*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if err := tied(t, c, key); (err == nil) != (failing == 2) {
				t.Errorf("after %d refusals its heartbeat: %v", refused.Load(), err)
			}
			if err := lease.Release(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// tied returns an error unless the session that holds a key depends on a heartbeat.
func tied(t *testing.T, c *kvtest.Consul, key string) error {
	t.Helper()
	pair, _, err := c.Client().KV().Get(kv.DefaultPrefix+key, nil)
	if err != nil || pair == nil || pair.Session == "" {
		return fmt.Errorf("the key is %+v, %v", pair, err)
	}
	info, _, err := c.Client().Session().Info(pair.Session, nil)
	if err != nil || info == nil || len(info.ServiceChecks) != 1 {
		return fmt.Errorf("the session is %+v, %v", info, err)
	}
	return nil
}

// Refusals of earlier terms, which others then held, don't cost a lease its heartbeat.
func TestLeaseForgetsEarlierRefusals(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/")
	f := newFront(t, c)
	const first, all = 5, 10 // each fewer than cost the heartbeat, but more together
	refusing, taken := make(chan struct{}), make(chan struct{})
	var tries atomic.Int64
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/agent/service/register") {
			return false
		}
		n := tries.Add(1)
		if n == first {
			close(refusing)
			<-taken
		}
		return n <= all && status(500)(w, r)
	})
	const key = "mirror/lease"
	standby := make(chan kv.Lease, 1)
	s := open(t, consul.Config{Client: f.config("")})
	go func() {
		l, err := s.Lease(t.Context(), key, "standby", 15*time.Second)
		if err != nil {
			t.Error(err)
		}
		standby <- l
	}()
	<-refusing
	other := c.Open("")
	l, err := other.Lease(t.Context(), key, "other", 15*time.Second)
	close(taken)
	if err != nil {
		t.Fatal(err)
	}
	e, err := other.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	awaitWaiting(t, f, e)
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if l = <-standby; l == nil {
		t.FailNow()
	}
	if err := tied(t, c, key); err != nil {
		t.Errorf("after %d tries: %v", tries.Load(), err)
	}
	if err := l.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// A Consul agent that takes the service, but doesn't say so in time, keeps none of a try that failed.
func TestLeaseLeavesNoServiceOfFailedTry(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/")
	f := newFront(t, c)
	var registered atomic.Int64
	f.setRewrite(func(r *http.Response) {
		if strings.HasSuffix(r.Request.URL.Path, "/agent/service/register") && registered.Add(1) <= 2 {
			r.StatusCode = http.StatusInternalServerError
		}
	})
	s := open(t, consul.Config{Client: f.config("")})
	lease, err := s.Lease(t.Context(), "mirror/lease", "mirror-1", 15*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	services, err := c.Client().Agent().ServicesWithFilter(`Service == "` + consul.LeaseService + `"`)
	if err != nil || len(services) != 1 || registered.Load() != 3 {
		t.Errorf("after %d tries the agent has %d services, %v", registered.Load(), len(services), err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// A Consul agent that restarts without its data, and then isn't ready for some seconds, isn't several agents.
func TestLeaseAfterAgentForgot(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/")
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config("")})
	const key = "mirror/lease"
	lease, err := s.Lease(t.Context(), key, "mirror-1", 15*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var unknown, again, beats atomic.Int64
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.Contains(r.URL.Path, "/agent/check/update/"):
			if again.Load() > 1 {
				beats.Add(1)
				return false
			}
			unknown.Add(1)
			return status(404)(w, r)
		case strings.HasSuffix(r.URL.Path, "/agent/service/register"):
			return again.Add(1) == 1 && status(500)(w, r)
		}
		return false
	})
	kvtest.Await(t, "a heartbeat that arrives", func() error {
		if beats.Load() == 0 {
			return errors.New("none")
		}
		return nil
	})
	if unknown.Load() != 2 || again.Load() != 2 {
		t.Errorf("%d heartbeats reached an agent that didn't know the service, which was registered %d times",
			unknown.Load(), again.Load())
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if lease, err = s.Lease(t.Context(), key, "mirror-1", 15*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := tied(t, c, key); err != nil {
		t.Error(err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// A holder that can't renew stops by its clock, before Consul could give the lease to another.
func TestLeaseEndsByClock(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/", "desired/")
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config("")})
	const ttl = 10 * time.Second
	lease, err := s.Lease(t.Context(), "mirror/lease", "first", ttl)
	if err != nil {
		t.Fatal(err)
	}
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool { // nothing comes back
		select {
		case <-r.Context().Done():
		case <-time.After(2 * ttl):
		}
		return true
	})
	start := time.Now()
	select {
	case <-lease.Context().Done():
	case <-time.After(ttl + 5*time.Second):
		t.Fatalf("a lease of %v goes on after %v without a renewal", ttl, time.Since(start))
	}
	if cause := context.Cause(lease.Context()); !errors.Is(cause, kv.ErrLeaseLost) {
		t.Fatalf("it ended because of %v", cause)
	}
	held, _, err := c.Client().KV().Get("kedge/mirror/lease", nil)
	if err != nil || held.Session == "" {
		t.Errorf("Consul gave it up before its holder did: %+v, %v", held, err)
	}
	f.setAnswer(nil)
	if err := s.Commit(t.Context(), lease, kv.Put("desired/k", nil)); !errors.Is(err, kv.ErrLeaseLost) {
		t.Fatalf("a commit after the end: %v", err)
	}
}

// Trouble that is shorter than the TTL doesn't end the lease, and the session outlives its TTL by being renewed.
func TestLeaseSurvivesTrouble(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/", "desired/")
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config("")})
	for try := 1; !survives(t, s, f); try++ {
		if try == 3 {
			t.Fatal("this machine stands still too often")
		}
	}
}

// survives reports whether a lease whose first two renewals are refused goes on. If it ends, the test has failed,
// unless heartbeats were seen to pause: a holder that is cut off for four seconds gives up its lease rightly.
func survives(t *testing.T, s *consul.Store, f *front) bool {
	t.Helper()
	lease, err := s.Lease(t.Context(), "mirror/lease", "first", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var renewals, refused, pause atomic.Int64
	var last atomic.Pointer[time.Time] // when a heartbeat came last
	beat := func() {
		now := time.Now()
		if before := last.Swap(&now); before != nil {
			pause.Store(max(pause.Load(), int64(now.Sub(*before))))
		}
	}
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/agent/check/update/") {
			beat()
		}
		if !strings.Contains(r.URL.Path, "/session/renew/") {
			return false
		}
		if renewals.Add(1) <= 2 {
			refused.Add(1)
			return status(500)(w, r)
		}
		return false
	})
	kvtest.Await(t, "renewals", func() error {
		if renewals.Load() < 5 && lease.Context().Err() == nil {
			return errors.New("too few")
		}
		return nil
	})
	if err := context.Cause(lease.Context()); err != nil {
		beat()
		paused := time.Duration(pause.Load())
		t.Logf("after %d refused renewals: %v; heartbeats paused for %v", refused.Load(), err, paused)
		if paused < 3*time.Second {
			t.Fatal("refused renewals ended the lease")
		}
		return false
	}
	if refused.Load() != 2 || last.Load() == nil {
		t.Fatalf("%d renewals were refused, last heartbeat %v", refused.Load(), last.Load())
	}
	if err := s.Commit(t.Context(), lease, kv.Put("desired/k", nil)); err != nil {
		t.Fatal(err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	return true
}

func TestLeaseLost(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "mirror/", "desired/")
	kvs, s := c.Client().KV(), c.Open("")
	const key = "kedge/mirror/lease"
	for name, take := range map[string]func(*api.KVPair) error{
		"session destroyed": func(p *api.KVPair) error {
			_, err := c.Client().Session().Destroy(p.Session, nil)
			return err
		},
		"unlocked by hand": func(p *api.KVPair) error {
			_, _, err := kvs.Release(p, nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			lease, err := s.Lease(t.Context(), "mirror/lease", "first", 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			p, _, err := kvs.Get(key, nil)
			if err == nil {
				err = take(p)
			}
			if err != nil {
				t.Fatal(err)
			}
			// Seen without a write, too, and before the clock would end it.
			select {
			case <-lease.Context().Done():
			case <-time.After(9 * time.Second):
				t.Fatal("the context goes on")
			}
			if err := s.Commit(t.Context(), lease, kv.Put("desired/k", nil)); !errors.Is(err, kv.ErrLeaseLost) {
				t.Fatalf("a commit: %v", err)
			}
			if err := lease.Release(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
	// A plain write by anyone doesn't take it away.
	lease, err := s.Lease(t.Context(), "mirror/lease", "first", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	put(t, c, "mirror/lease", "scribble")
	if err := s.Commit(t.Context(), lease, kv.Put("desired/k", nil)); err != nil {
		t.Fatal(err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, ttl := range []time.Duration{0, 9 * time.Second, 25 * time.Hour} {
		if _, err := s.Lease(t.Context(), "mirror/lease", "x", ttl); err == nil || errors.Is(err, kv.ErrUnavailable) {
			t.Errorf("a ttl of %v: %v", ttl, err)
		}
	}
}

// The leader of Consul dies while a lease is held, and while another waits for it.
func TestLeaseThroughLeaderLoss(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: 3, Clients: []string{"mirror-1"}})
	folders(t, c, "mirror/", "desired/")
	s := c.Clients[0].Open("")
	lease, err := s.Lease(t.Context(), "mirror/lease", "first", 15*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan kv.Lease, 1)
	waiting := c.Clients[0].Open("")
	go func() {
		l, err := waiting.Lease(t.Context(), "mirror/lease", "second", 15*time.Second)
		if err != nil {
			t.Error(err)
		}
		second <- l
	}()
	c.Leader().Kill()
	kvtest.Await(t, "a fenced write under the next leader", func() error {
		err := s.Commit(t.Context(), lease, kv.Put("desired/k", []byte("v")))
		if err != nil && !errors.Is(err, kv.ErrUnavailable) {
			t.Fatalf("commit: %v", err)
		}
		return err
	})
	select {
	case <-second:
		t.Fatal("two hold the lease")
	default:
	}
	kvtest.Await(t, "the release", func() error { return lease.Release(t.Context()) })
	select {
	case l := <-second:
		if l == nil {
			t.FailNow()
		}
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the lease was not given on")
	}
}
