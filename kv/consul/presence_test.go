package consul_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// awaitWaiting waits until a query waits for a change of an entry after the one that is seen.
func awaitWaiting(t *testing.T, f *front, e kv.Entry) {
	t.Helper()
	kvtest.Await(t, "a query that waits", func() error {
		for _, r := range f.requests() {
			index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
			if strings.HasSuffix(r.URL.Path, e.Key) && index >= e.Version {
				return nil
			}
		}
		return errors.New("none")
	})
}

// With the token that an agent has, an entry lives as long as its node.
func TestPresenceDiesWithNode(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true, Clients: []string{"web-1"}})
	folders(t, c, "status/prod/web/")
	token := c.Token(`key_prefix "kedge/status/" { policy = "write" } session "web-1" { policy = "write" }`)
	views := kvtest.Watch(t, c.Open(c.RootToken), "status/prod/web/")
	p := kvtest.Present(t, c.Clients[0].Open(token), "web-1")
	v := views.Await(t, "the entry", kvtest.Held("web-1=ready"))
	info, _, err := c.Client().Session().Info(v.Entries[0].Session, nil)
	if err != nil || info.Node != "web-1" || info.TTL != "" || info.Behavior != "release" {
		t.Fatalf("the session is %+v, %v; want one of the node's health alone", info, err)
	}

	c.Clients[0].Kill()
	views.Await(t, "the node's death", func(v kv.View) bool { return len(v.Entries) == 1 && v.Entries[0].Session == "" })
	c.Clients[0].Start()
	c.WaitReady()
	views.Await(t, "the node's return", kvtest.Held("web-1=ready"))
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "its leave", kvtest.Healthy(""))
	kvtest.Await(t, "the session's end", func() error {
		all, _, err := c.Client().Session().Node("web-1", nil)
		if err == nil && len(all) > 0 {
			err = errors.New("there is one still")
		}
		return err
	})
}

// Where Consul's agent isn't the node's own, the session must not hang on a strange node's health.
func TestPresenceAtDistantAgent(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config("")})
	views := kvtest.Watch(t, s, "status/prod/web/")
	p := kvtest.Present(t, s, "web-7")
	v := views.Await(t, "the entry", kvtest.Held("web-7=ready"))
	info, _, err := c.Client().Session().Info(v.Entries[0].Session, nil)
	if err != nil || info.TTL == "" {
		t.Fatalf("the session is %+v, %v; want one with a TTL", info, err)
	}
	kvtest.Await(t, "its renewal", func() error {
		if !slices.ContainsFunc(f.requests(), func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/session/renew/"+info.ID) }) {
			return errors.New("not renewed")
		}
		return nil
	})
	// One that is gone gives way to another.
	if _, err := c.Client().Session().Destroy(info.ID, nil); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "another session", func(v kv.View) bool { return kvtest.Held("web-7=ready")(v) && v.Entries[0].Session != info.ID })
	all, _, err := c.Client().Session().List(nil)
	if err != nil || len(all) != 1 {
		t.Errorf("there are %d sessions, %v; want none left of those that were tried", len(all), err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestPresenceWithoutHealthCheck(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	dereg := &api.CatalogDeregistration{Node: "server-1", CheckID: "serfHealth"}
	if _, err := c.Client().Catalog().Deregister(dereg, nil); err != nil {
		t.Fatal(err)
	}
	s := c.Open("")
	p := kvtest.Present(t, s, "server-1")
	e, err := s.Get(t.Context(), "status/prod/web/server-1")
	if err != nil {
		t.Fatal(err)
	}
	info, _, err := c.Client().Session().Info(e.Session, nil)
	if err != nil || info.TTL == "" || len(info.NodeChecks) != 0 {
		t.Fatalf("the session is %+v, %v; want one with a TTL and without checks", info, err)
	}

	// The check comes, as when Consul joins only after the first report: what is held goes over with the next one,
	// and is never nobody's.
	views := kvtest.Watch(t, c.Open(""), "status/prod/web/")
	views.Await(t, "the entry", kvtest.Held("server-1=ready"))
	_, err = c.Client().Catalog().Register(&api.CatalogRegistration{Node: "server-1", SkipNodeUpdate: true,
		Check: &api.AgentCheck{Node: "server-1", CheckID: "serfHealth", Name: "Serf Health Status", Status: "passing"}}, nil)
	if err == nil {
		err = p.Put(t.Context(), "status/prod/web/server-1-other", []byte("ready"))
	}
	if err != nil {
		t.Fatal(err)
	}
	v := views.Await(t, "both entries", func(v kv.View) bool { return len(v.Entries) == 2 && v.Entries[1].Session != "" })
	views.Never(t, "an entry of nobody's", func(v kv.View) bool { return len(v.Entries) > 0 && v.Entries[0].Session == "" })
	all, _, err := c.Client().Session().List(nil)
	if err != nil || len(all) != 1 || all[0].TTL != "" || v.Entries[0].Session != all[0].ID || v.Entries[1].Session != all[0].ID {
		t.Fatalf("the sessions are %+v, %v; want one of the node's health that holds both of %+v", all, err, v.Entries)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The session goes although the node lives: destroyed by somebody, or undone by a restore.
func TestPresenceRepairs(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	before := c.Snapshot()
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config("")})
	views := kvtest.Watch(t, c.Open(""), "status/prod/web/")
	p := kvtest.Present(t, s, "server-1")
	first := views.Await(t, "the entry", kvtest.Held("server-1=ready")).Entries[0].Session
	if _, err := c.Client().Session().Destroy(first, nil); err != nil {
		t.Fatal(err)
	}
	v := views.Await(t, "another session", func(v kv.View) bool { return kvtest.Held("server-1=ready")(v) && v.Entries[0].Session != first })
	// A restore is seen at once by a query that waits meanwhile; by one that comes later, at the end of its wait.
	awaitWaiting(t, f, v.Entries[0])
	c.Restore(before)
	v = views.Await(t, "the entry after a restore", kvtest.Held("server-1=ready"))
	// The servers know of the process's check no more, and the Consul agent doesn't notice: it is made anew.
	restored, _, err := c.Client().Session().Info(v.Entries[0].Session, nil)
	if err != nil || restored == nil || len(restored.ServiceChecks) != 1 {
		t.Fatalf("after a restore the session doesn't end with the process: %+v, %v", restored, err)
	}
	if err := p.Put(t.Context(), "status/prod/web/server-1", []byte("again")); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "a later report", kvtest.Held("server-1=again"))
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A Put that comes before anybody saw that the session is gone makes another itself.
func TestPresencePutsWithoutSession(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	f := newFront(t, c)
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		return strings.Contains(r.URL.Path, "/session/info/") && isStale(r) && status(500)(w, r)
	})
	s := open(t, consul.Config{Client: f.config("")})
	p := kvtest.Present(t, s, "server-1")
	e, err := s.Get(t.Context(), "status/prod/web/server-1")
	if err == nil {
		_, err = c.Client().Session().Destroy(e.Session, nil)
	}
	if err == nil {
		err = p.Put(t.Context(), "status/prod/web/server-1", []byte("later"))
	}
	if err != nil {
		t.Fatal(err)
	}
	if now, err := s.Get(t.Context(), "status/prod/web/server-1"); err != nil || string(now.Value) != "later" || now.Session == "" || now.Session == e.Session {
		t.Fatalf("the entry is %+v, %v", now, err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A restore that leaves the session and brings back what it held earlier: the writer, which writes on change, wouldn't.
// It joins anew, so that what is decided by the earlier report doesn't move it.
func TestPresenceWritesAgainAfterRestore(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	f := newFront(t, c)
	views := kvtest.Watch(t, c.Open(""), "status/prod/web/")
	p := kvtest.Present(t, open(t, consul.Config{Client: f.config("")}), "server-1")
	before := c.Snapshot()
	joined, lost, err := p.Join(t.Context(), "status/prod/web/server-1", []byte("later"))
	if err != nil {
		t.Fatal(err)
	}
	v := views.Await(t, "the later report", kvtest.Held("server-1=later"))
	awaitWaiting(t, f, v.Entries[0])
	c.Restore(before)
	views.Await(t, "the later report, again", func(now kv.View) bool {
		return kvtest.Held("server-1=later")(now) && now.Entries[0].Version != v.Entries[0].Version &&
			now.Entries[0].Session != v.Entries[0].Session
	})
	<-lost
	if again, _, err := p.Join(t.Context(), "status/prod/web/server-1", []byte("later")); err != nil || again <= joined {
		t.Fatalf("it joined at %d, %v, and at %d before the restore", again, err, joined)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A process that ends while its entries go over to a session with a heartbeat leaves none, and no session.
func TestPresenceClosesBetweenSessions(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	const web = "status/prod/web/server-1"
	f := newFront(t, c)
	var asked, stopped atomic.Int64
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, "/agent/service/register"):
			return asked.Add(1) == 1 && status(500)(w, r)
		case strings.HasSuffix(r.URL.Path, "/txn"):
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			if bytes.Contains(body, []byte(`"unlock"`)) {
				stopped.Add(1)
				return status(500)(w, r)
			}
		}
		return false
	})
	p, err := open(t, consul.Config{Client: f.config("")}).Presence(t.Context(), "server-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Put(t.Context(), web, []byte("ready")); err != nil {
		t.Fatal(err)
	}
	kvtest.Await(t, "the entry to go over", func() error {
		if stopped.Load() == 0 {
			return errors.New("it doesn't yet")
		}
		return nil
	})
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.Open("").Get(t.Context(), web); !errors.Is(err, kv.ErrNotFound) {
		t.Errorf("the entry: %v", err)
	}
	if all, _, err := c.Client().Session().List(nil); err != nil || len(all) != 0 {
		t.Errorf("%d sessions are left, %v", len(all), err)
	}
}

// A Consul agent that isn't ready for the heartbeat when the node boots doesn't cost the entries their heartbeat. They
// go over to a session with one, and are never nobody's.
func TestPresenceAsksAgainForHeartbeat(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/", "status/prod/db/")
	const web, db = "status/prod/web/server-1", "status/prod/db/server-1"
	registers := func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/agent/service/register") }
	ties := func(r *http.Request) bool { // the servers don't know the check
		if !strings.HasSuffix(r.URL.Path, "/session/create") {
			return false
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		return bytes.Contains(body, []byte("ServiceChecks"))
	}
	for name, fails := range map[string]func(*http.Request) bool{"the service": registers, "the session": ties} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, c)
			var asked atomic.Int64
			f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
				return fails(r) && asked.Add(1) <= 2 && status(500)(w, r)
			})
			views := kvtest.Watch(t, c.Open(""), "status/prod/web/")
			p := kvtest.Present(t, open(t, consul.Config{Client: f.config("")}), "server-1")
			if err := p.Put(t.Context(), db, []byte("ready")); err != nil {
				t.Fatal(err)
			}
			kvtest.Await(t, "the heartbeat", func() error {
				return errors.Join(tied(t, c, web), tied(t, c, db))
			})
			views.Await(t, "the entry", kvtest.Held("server-1=ready"))
			views.Never(t, "an entry of nobody's", func(v kv.View) bool {
				return len(v.Entries) == 1 && v.Entries[0].Session == ""
			})
			kvtest.Await(t, "the end of all other sessions and services", func() error {
				all, _, err := c.Client().Session().List(nil)
				if err != nil {
					return err
				}
				services, err := c.Client().Agent().Services()
				if err == nil && (len(all) != 1 || len(services) != 1) {
					err = fmt.Errorf("there are %d sessions and %d services", len(all), len(services))
				}
				return err
			})
			if n := asked.Load(); n != 3 {
				t.Errorf("it asked %d times, want two refused times and a last one", n)
			}
			if err := p.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A process that was killed leaves a session that lives as long as the node. The next one takes over what it also
// has, and ends it, once nothing else of it can be needed.
func TestPresenceEndsWhatEarlierOnesLeft(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/", "status/prod/db/")
	left := func(keys ...string) (session string) { // what a killed process leaves
		t.Helper()
		session, _, err := c.Client().Session().Create(&api.SessionEntry{Name: "kedge presence of server-1", LockDelay: 1}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range keys {
			held, _, err := c.Client().KV().Acquire(&api.KVPair{Key: "kedge/" + key, Value: []byte("left"), Session: session}, nil)
			if err != nil || !held {
				t.Fatal(held, err)
			}
		}
		return session
	}
	there := func(session string) bool {
		t.Helper()
		info, _, err := c.Client().Session().Info(session, nil)
		if err != nil {
			t.Fatal(err)
		}
		return info != nil
	}
	older, newer := left(), left("status/prod/web/server-1", "status/prod/db/server-1")
	other, _, err := c.Client().Session().Create(&api.SessionEntry{Name: "by hand"}, nil)
	if err != nil {
		t.Fatal(err)
	}

	// The node has one role less now.
	web, db := kvtest.Watch(t, c.Open(""), "status/prod/web/"), kvtest.Watch(t, c.Open(""), "status/prod/db/")
	released := func(v kv.View) bool { return kvtest.Values(v) == "server-1=left" && v.Entries[0].Session == "" }
	db.Await(t, "what was left", kvtest.Held("server-1=left"))
	p := kvtest.Present(t, c.Open(""), "server-1")
	if there(older) || !there(newer) {
		t.Error("of those left, at first the newest stays, which may hold what is yet to be put anew")
	}
	web.Await(t, "the entry", kvtest.Held("server-1=ready"))
	if err := p.Close(t.Context()); err != nil { // which is early, and takes them along
		t.Fatal(err)
	}
	db.Await(t, "the end of what is not the node's any more", released)
	if there(newer) {
		t.Error("a process that ended soon left what it found")
	}

	newer = left("status/prod/web/server-1", "status/prod/db/server-1")
	db.Await(t, "what was left once more", kvtest.Held("server-1=left"))
	s := c.Open("")
	consul.SetEndOthersAfter(s, time.Millisecond)
	kvtest.Present(t, s, "server-1")
	db.Await(t, "its end", released)
	if there(newer) || !there(other) {
		t.Error("in the end, only others' sessions stay")
	}
	if e, err := s.Get(t.Context(), "status/prod/web/server-1"); err != nil || e.Session == "" {
		t.Errorf("with it went %+v, %v", e, err)
	}
}

// While a presence asks for the sessions that earlier processes left, it puts entries, and the
// answer ends no session that it opened meanwhile.
func TestPresencePutsWhileItEndsOthers(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	older, _, err := c.Client().Session().Create(&api.SessionEntry{Name: "kedge presence of server-1", LockDelay: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := newFront(t, c)
	var lists atomic.Int64
	listing, release := make(chan struct{}), make(chan struct{})
	f.setAnswer(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v1/session/node/") && lists.Add(1) == 2 {
			close(listing)
			<-release
		}
		return false
	})
	s := open(t, consul.Config{Client: f.config("")})
	consul.SetEndOthersAfter(s, time.Millisecond)
	p := kvtest.Present(t, s, "server-1")
	<-listing
	const key = "status/prod/web/server-1"
	e, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Client().Session().Destroy(e.Session, nil); err != nil {
		t.Fatal(err)
	}
	put := make(chan error, 1)
	go func() { put <- p.Put(t.Context(), key, []byte("anew")) }()
	select {
	case err := <-put:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a put waits for the list of sessions")
	}
	close(release)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		info, _, err := c.Client().Session().Info(older, nil)
		if err != nil {
			t.Fatal(err)
		}
		if info == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the session of an earlier process stays")
		}
	}
	if e, err = s.Get(t.Context(), key); err != nil || e.Session == "" {
		t.Errorf("the entry is %+v, %v", e, err)
	}
}

// A node's agent that was started twice isn't gone once the second one ends.
func TestPresenceComesBackAfterAnother(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	views := kvtest.Watch(t, c.Open(""), "status/prod/web/")
	put := func(value string) kv.Presence {
		p, err := c.Open("").Presence(t.Context(), "server-1")
		if err == nil {
			err = p.Put(t.Context(), "status/prod/web/server-1", []byte(value))
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close(context.Background()) })
		return p
	}
	put("first")
	views.Await(t, "the first", kvtest.Held("server-1=first"))
	second := put("second")
	views.Await(t, "the second", kvtest.Held("server-1=second"))
	if err := second.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	views.Await(t, "the first again", kvtest.Held("server-1=first"))
	t.Logf("the first is back %v after the second ended", time.Since(began).Round(time.Millisecond))
}

// An entry that another process has taken doesn't delay the return of the others.
func TestPresenceRepairsBesideTaken(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/db/", "status/prod/web/")
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config("")})
	consul.SetPresenceCheckAfter(s, 200*time.Millisecond)
	const kept, taken = "status/prod/db/server-1", "status/prod/web/server-1"
	p := kvtest.Present(t, s, "server-1")
	if err := p.Put(t.Context(), kept, []byte("ready")); err != nil {
		t.Fatal(err)
	}
	kvtest.Present(t, c.Open(""), "server-1") // takes one of the two
	takenAwaited := func(r *http.Request) bool {
		return strings.HasSuffix(r.URL.Path, taken) && r.URL.Query().Get("wait") == "5000ms"
	}
	kvtest.Await(t, "the first to see that", func() error {
		for _, r := range f.requests() {
			if strings.HasSuffix(r.URL.Path, taken) && r.URL.Query().Has("consistent") {
				return nil
			}
		}
		return errors.New("not yet")
	})
	// Its session goes, and Consul makes no other at once.
	var refused atomic.Bool
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		return strings.HasSuffix(r.URL.Path, "/session/create") && !refused.Swap(true) && status(500)(w, r)
	})
	e, err := s.Get(t.Context(), kept)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Client().Session().Destroy(e.Session, nil); err != nil {
		t.Fatal(err)
	}
	kvtest.Await(t, "the other entry", func() error {
		for _, r := range f.requests() {
			if refused.Load() && takenAwaited(r) {
				t.Fatal("it waited for the taken entry before it put the other one again")
			}
		}
		now, err := s.Get(t.Context(), kept)
		if err == nil && (now.Session == "" || now.Session == e.Session) {
			err = errors.New("nobody holds it")
		}
		return err
	})
}

// Whoever else holds the entry loses it, but not the session, which may hold more.
func TestPresenceLeavesOthersSessions(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	other, _, err := c.Client().Session().Create(&api.SessionEntry{Name: "by hand", LockDelay: 1}, nil)
	if err == nil {
		_, _, err = c.Client().KV().Acquire(&api.KVPair{Key: "kedge/status/prod/web/server-1", Value: []byte("x"), Session: other}, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := c.Open("")
	kvtest.Present(t, s, "server-1")
	e, err := s.Get(t.Context(), "status/prod/web/server-1")
	if err != nil || string(e.Value) != "ready" || e.Session == "" || e.Session == other {
		t.Fatalf("the entry is %+v, %v", e, err)
	}
	if info, _, err := c.Client().Session().Info(other, nil); err != nil || info == nil {
		t.Fatalf("the other's session is %+v, %v", info, err)
	}
}

// Of entries that stand as they were put any server is asked; the leader is where that server may be behind.
func TestPresenceAsksTheLeaderInDoubt(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/", "status/prod/db/")
	f := newFront(t, c)
	s := open(t, consul.Config{Client: f.config(c.RootToken)})
	consul.SetPresenceCheckAfter(s, 200*time.Millisecond)
	p := kvtest.Present(t, s, "web-1")
	keys := []string{"status/prod/db/web-1", "status/prod/web/web-1"}
	for _, key := range keys {
		if err := p.Put(t.Context(), key, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	stale, leader := 0, 0 // reads of the key that isn't watched, and of anything from the leader, so far
	rounds := func(enough func() bool) {
		t.Helper()
		kvtest.Await(t, "more rounds", func() error {
			for _, r := range f.requests() {
				switch q := r.URL.Query(); {
				case q.Has("consistent"):
					leader++
				case q.Has("stale") && strings.HasSuffix(r.URL.Path, keys[1]):
					stale++
				}
			}
			if !enough() {
				return fmt.Errorf("%d stale reads, and %d of the leader", stale, leader)
			}
			return nil
		})
	}
	f.requests()                              // a look at an entry while it is put is in doubt
	rounds(func() bool { return stale >= 2 }) // what came of such a look is over by the second
	leader = 0
	rounds(func() bool { return stale >= 5 })
	if leader > 0 {
		t.Errorf("the leader was asked %d times", leader)
	}
	f.setRewrite(func(r *http.Response) { r.Header.Set("X-Consul-LastContact", "60000") })
	rounds(func() bool { return leader > 0 })
}
