package consul_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
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

const readWeb = `key_prefix "kedge/pins/prod/web/" { policy = "read" }`

func put(t *testing.T, c *kvtest.Consul, key, value string) {
	t.Helper()
	if _, err := c.Client().KV().Put(&api.KVPair{Key: kv.DefaultPrefix + key, Value: []byte(value)}, nil); err != nil {
		t.Fatal(err)
	}
}

func folders(t *testing.T, c *kvtest.Consul, prefixes ...string) {
	t.Helper()
	if err := c.Open(c.RootToken).EnsureFolders(t.Context(), prefixes...); err != nil {
		t.Fatal(err)
	}
}

// A token that may not read sees an empty store. It must never look like "all pins are gone".
func TestLostToken(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	token := c.Token(readWeb)
	f := newFront(t, c)
	views := kvtest.Watch(t, open(t, consul.Config{Client: f.config(token)}), "pins/prod/web/")
	views.Await(t, "the pin", kvtest.Healthy("app=v1"))
	kvtest.Await(t, "a query that waits", func() error {
		if !slices.ContainsFunc(f.requests(), isStale) {
			return errors.New("none")
		}
		return nil
	})
	time.Sleep(100 * time.Millisecond) // from the front to Consul, where the token is looked at
	c.RevokeToken(token)
	put(t, c, "pins/prod/web/app", "v2") // which the query that waits since before the loss still sees
	views.Await(t, "the refusal", kvtest.Troubled(kv.ErrDenied, "app=v2"))
	views.Never(t, "the pin vanished", func(v kv.View) bool { return v.Synced && len(v.Entries) == 0 })

	// Tokens without rights, and none at all, which Consul answers with 404.
	for name, token := range map[string]string{"none": "", "another prefix's": c.Token(`key_prefix "kedge/status/" { policy = "read" }`)} {
		s := c.Open(token)
		if _, err := s.List(t.Context(), "pins/prod/web/"); !errors.Is(err, kv.ErrDenied) {
			t.Errorf("list with the token %s: %v", name, err)
		}
		if v := kvtest.Watch(t, s, "pins/prod/web/").
			Await(t, "a view", func(kv.View) bool { return true }); v.Synced ||
			!errors.Is(v.Err, kv.ErrDenied) {
			t.Errorf("watch with the token %s: %+v", name, v)
		}
		if err := s.Commit(
			t.Context(),
			nil,
			kv.Put("pins/prod/web/app", nil),
		); !errors.Is(err, kv.ErrDenied) ||
			errors.Is(err, kv.ErrConflict) {
			t.Errorf("commit with the token %s: %v", name, err)
		}
		if err := s.EnsureFolders(t.Context(), "pins/prod/db/"); !errors.Is(err, kv.ErrDenied) {
			t.Errorf("ensure folders with the token %s: %v", name, err)
		}
		if _, err := s.Lease(t.Context(), "mirror/lease", "x", 10*time.Second); !errors.Is(err, kv.ErrDenied) {
			t.Errorf("lease with the token %s: %v", name, err)
		}
		p, err := s.Presence(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Put(t.Context(), "status/prod/web/x", nil); !errors.Is(err, kv.ErrDenied) {
			t.Errorf("presence with the token %s: %v", name, err)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	// May read, may not write: told apart from a failed condition.
	err := c.Open(c.Token(readWeb)).Commit(t.Context(), nil, kv.Create("pins/prod/web/app", nil))
	if !errors.Is(err, kv.ErrDenied) || errors.Is(err, kv.ErrConflict) {
		t.Errorf("commit with a token that may only read: %v", err)
	}
	// A token that sees a part of a prefix sees no absence in it.
	put(t, c, "pins/prod/db/pg", "v1")
	folders(t, c, "pins/")
	partial := c.Open(c.Token(readWeb + ` key "kedge/pins/" { policy = "read" }`))
	if _, err := partial.List(t.Context(), "pins/"); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("list of what may be read in part: %v", err)
	}
	kvtest.Watch(t, partial, "pins/").Await(t, "what may be read, and the error", kvtest.Troubled(kv.ErrDenied, "app=v2"))
}

func TestTokenFile(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	file := filepath.Join(t.TempDir(), "token")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := consul.Config{Client: &api.Config{Address: c.Addr(), TokenFile: file}}
	for _, empty := range []string{"", " \n"} {
		write(empty)
		if _, err := consul.Open(config); err == nil || !strings.Contains(err.Error(), file) {
			t.Fatalf("open with an empty token file: %v", err)
		}
	}
	if _, err := consul.Open(
		consul.Config{Client: &api.Config{Address: c.Addr(), TokenFile: file + ".none"}},
	); err == nil {
		t.Fatal("open took a token file that isn't there")
	}

	first, second := c.Token(readWeb), c.Token(readWeb)
	write(first + "\n")
	s := open(t, config)
	views := kvtest.Watch(t, s, "pins/prod/web/")
	views.Await(t, "the pin", kvtest.Healthy("app=v1"))

	// Changed while it is used.
	write(second)
	c.RevokeToken(first)
	if _, err := s.List(t.Context(), "pins/prod/web/"); err != nil {
		t.Fatalf("list with the new token: %v", err)
	}
	put(t, c, "pins/prod/web/app", "v2")
	views.Await(t, "the change", kvtest.Healthy("app=v2"))

	// Emptied: the last token stays in use.
	write("")
	if _, err := s.List(t.Context(), "pins/prod/web/"); err != nil {
		t.Fatalf("list while the token file is empty: %v", err)
	}

	// Changed so that the file looks the same: the refusal makes it be read again.
	write(second)
	if _, err := s.List(t.Context(), "pins/prod/web/"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	third := c.Token(readWeb)
	write(third)
	if err := os.Chtimes(file, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	c.RevokeToken(second)
	if _, err := s.Get(t.Context(), "pins/prod/web/app"); err != nil {
		t.Fatalf("get after the refusal: %v", err)
	}
}

// A token that loses its rights, and isn't revoked, gets a 404 or a part of what there is, from the leader too.
// What was known stays known.
func TestLostRights(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	put(t, c, "pins/prod/web/base", "v1")
	for name, body := range map[string]string{
		"all":  "[]",
		"some": `[{"Key":"kedge/pins/prod/web/base","Value":"djI=","ModifyIndex":1000000}]`,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, c)
			views := kvtest.Watch(t, open(t, consul.Config{Client: f.config("")}), "pins/prod/web/")
			before := views.Await(t, "the pins", kvtest.Healthy("app=v1 base=v1"))
			f.setRewrite(func(r *http.Response) {
				r.Body = io.NopCloser(strings.NewReader(body))
				r.ContentLength = int64(len(body))
				r.Header.Del("Content-Length")
			})
			put(t, c, "pins/prod/web/app", "wake"+name)
			want := map[string]string{"all": "app=v1 base=v1", "some": "app=v1 base=v2"}[name]
			lost := views.Await(t, "the loss", kvtest.Troubled(kv.ErrDenied, want))
			if !lost.Synced || !lost.Since.After(before.Since) {
				t.Errorf("synced: %v, since %v; before since %v", lost.Synced, lost.Since, before.Since)
			}
			views.Never(t, "a pin vanished", func(v kv.View) bool { return len(v.Entries) != 2 })
			f.setRewrite(nil)
			put(t, c, "pins/prod/web/app", "v1") // a query that shows a part waits for a change
			views.Await(t, "the rights are back", kvtest.Healthy("app=v1 base=v1"))
		})
	}
}

// A restore wakes a watch with the old value and the index that it sent; going on from there would hide what was
// restored for a whole wait.
func TestRestoreWhileWatching(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "old")
	put(t, c, "pins/prod/web/other", "old")
	snapshot := c.Snapshot()
	put(t, c, "pins/prod/web/app", "new")
	put(t, c, "pins/prod/web/later", "new")
	views := kvtest.Watch(t, c.Open(""), "pins/prod/web/")
	views.Await(t, "the present", kvtest.Healthy("app=new later=new other=old"))
	start := time.Now()
	c.Restore(snapshot)
	views.Await(t, "the past", kvtest.Healthy("app=old other=old"))
	t.Logf("the restored value was seen after %v", time.Since(start))
	put(t, c, "pins/prod/web/app", "newest")
	views.Await(t, "a change after the restore", kvtest.Healthy("app=newest other=old"))
}

func TestWatchThroughLeaderLoss(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: 3, Clients: []string{"web-1"}})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	put(t, c, "pins/prod/web/base", "v1")
	s := c.Clients[0].Open("")
	views := kvtest.Watch(t, s, "pins/prod/web/")
	views.Await(t, "the pins", kvtest.Healthy("app=v1 base=v1"))

	leader := c.Leader()
	leader.Kill()
	next := c.Leader()
	kvs := next.Client("").KV()
	kvtest.Await(t, "a write after the election", func() error {
		_, err := kvs.Put(&api.KVPair{Key: "kedge/pins/prod/web/app", Value: []byte("v2")}, nil)
		return err
	})
	views.Await(t, "the change under the new leader", kvtest.Healthy("app=v2 base=v1"))

	// Without a quorum nothing changes, and a server that is alone is no authority on what is absent.
	leader.Start()
	c.WaitReady()
	var alone *kvtest.ConsulNode
	for _, n := range c.Servers {
		if n != c.Servers[0] {
			n.Kill()
		} else {
			alone = n
		}
	}
	err := alone.Open("").Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("v3")))
	if !errors.Is(err, kv.ErrUnavailable) {
		t.Fatalf("a commit without a quorum: %v", err)
	}
	lonely := kvtest.Watch(t, alone.Open(""), "pins/prod/web/")
	lonely.Await(t, "the trouble", func(v kv.View) bool { return errors.Is(v.Err, kv.ErrUnavailable) && !v.Synced })
	for _, n := range c.Servers[1:] {
		n.Start()
	}
	c.WaitReady()
	lonely.Await(t, "the recovery", func(v kv.View) bool { return v.Synced && v.Err == nil && len(v.Entries) == 2 })
	views.Never(t, "a pin vanished", func(v kv.View) bool { return v.Synced && len(v.Entries) != 2 })
}

func TestRestartWhileWatching(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Persistent: true})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	s := c.Open("")
	views := kvtest.Watch(t, s, "pins/prod/web/")
	views.Await(t, "the pin", kvtest.Healthy("app=v1"))
	c.Servers[0].Kill()
	views.Await(t, "the outage", kvtest.Troubled(kv.ErrUnavailable, "app=v1"))
	if _, err := s.Get(t.Context(), "pins/prod/web/app"); !errors.Is(err, kv.ErrUnavailable) {
		t.Fatalf("get while Consul is away: %v", err)
	}
	// One that starts while Consul is away says so, and comes to know what is there later.
	late := kvtest.Watch(t, c.Open(""), "pins/prod/web/")
	late.Await(t, "the outage", func(v kv.View) bool { return errors.Is(v.Err, kv.ErrUnavailable) && !v.Synced })
	c.Servers[0].Start()
	c.WaitReady()
	views.Await(t, "the recovery", kvtest.Healthy("app=v1"))
	late.Await(t, "the recovery", kvtest.Healthy("app=v1"))
	views.Never(t, "the pin vanished", func(v kv.View) bool { return v.Synced && len(v.Entries) != 1 })
}

// What the consul program writes is seen at once.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	folders(t, c, "pins/prod/web/")
	views := kvtest.Watch(t, c.Open(c.Token(readWeb)), "pins/prod/web/")
	views.Await(t, "the start", kvtest.Healthy(""))
	token := c.Token(`key_prefix "kedge/pins/" { policy = "write" }`)
	c.CLI(token, "v1\n", "kv", "put", "kedge/pins/prod/web/app", "-")
	written := time.Now()
	views.Await(t, "the pin with its newline", kvtest.Healthy("app=v1\n"))
	t.Logf("seen %v after the program ended", time.Since(written))
	c.CLI(token, "", "kv", "delete", "kedge/pins/prod/web/app")
	views.Await(t, "its end", kvtest.Healthy(""))
}

func TestFaultyAnswers(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	for _, tt := range []struct {
		name   string
		answer func(http.ResponseWriter, *http.Request) bool
		want   error
	}{
		{"429 too many", status(429), kv.ErrUnavailable},
		{"500 no leader", status(500), kv.ErrUnavailable},
		{"503 limited", status(503), kv.ErrUnavailable},
		{"403 refused", status(403), kv.ErrDenied},
		{"413 too large", status(413), kv.ErrTooLarge},
		{"cut", func(w http.ResponseWriter, _ *http.Request) bool {
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				conn.Close()
			}
			return true
		}, kv.ErrUnavailable},
		{"no Consul at all", func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = io.WriteString(w, "<html>welcome</html>")
			return true
		}, kv.ErrUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFront(t, c)
			s := open(t, consul.Config{Client: f.config("")})
			views := kvtest.Watch(t, s, "pins/prod/web/")
			views.Await(t, "the pin", kvtest.Healthy("app=v1"))
			f.setAnswer(tt.answer)
			if _, err := s.Get(t.Context(), "pins/prod/web/app"); !errors.Is(err, tt.want) {
				t.Errorf("get: %v", err)
			}
			if _, err := s.List(t.Context(), "pins/prod/web/"); !errors.Is(err, tt.want) {
				t.Errorf("list: %v", err)
			}
			if err := s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("never"))); !errors.Is(err, tt.want) {
				t.Errorf("commit: %v", err)
			}
			fresh := kvtest.Watch(t, open(t, consul.Config{Client: f.config("")}), "pins/prod/web/")
			fresh.Await(t, "the trouble", func(v kv.View) bool { return v.Err != nil && !v.Synced })
			f.requests()
			f.setAnswer(nil)
			fresh.Await(t, "the recovery", kvtest.Healthy("app=v1"))
			views.Await(t, "the pin", kvtest.Healthy("app=v1"))
		})
	}
}

// Each answer of a server that is behind or alone is one that a restarted or partitioned server could give.
func TestStaleAnswers(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/")
	replaceBody := func(r *http.Response, body string) {
		r.Body = io.NopCloser(strings.NewReader(body))
		r.ContentLength = int64(len(body))
		r.Header.Del("Content-Length")
	}
	for _, tt := range []struct {
		name    string
		rewrite func(*http.Response)
		trouble bool // that the view says so
	}{
		{"knows no leader, and is empty", func(r *http.Response) {
			r.Header.Set("X-Consul-KnownLeader", "false")
			replaceBody(r, "[]")
		}, true},
		{"heard from the leader long ago", func(r *http.Response) {
			r.Header.Set("X-Consul-LastContact", "11000")
			replaceBody(r, "[]")
		}, true},
		{"empty", func(r *http.Response) { replaceBody(r, "[]") }, false},
		{"not found", func(r *http.Response) {
			r.StatusCode, r.Status = 404, "404 Not Found"
			replaceBody(r, "")
		}, false},
		{"without a key", func(r *http.Response) {
			replaceBody(r, `[{"Key":"kedge/pins/prod/web/","Value":null,"ModifyIndex":1}]`)
		}, false},
		{"an older version of a key", func(r *http.Response) {
			replaceBody(r, `[{"Key":"kedge/pins/prod/web/","Value":null,"ModifyIndex":1},{"Key":"kedge/pins/prod/web/app","Value":"b2xk","ModifyIndex":2}]`)
		}, false},
		{"index gone back", func(r *http.Response) { r.Header.Set("X-Consul-Index", "2") }, false},
		{"index of zero", func(r *http.Response) { r.Header.Set("X-Consul-Index", "0") }, false},
		{"filtered", func(r *http.Response) {
			r.Header.Set("X-Consul-Results-Filtered-By-ACLs", "true")
			replaceBody(r, "[]")
		}, false},
		{"filtered, and whole all the same", func(r *http.Response) {
			r.Header.Set("X-Consul-Results-Filtered-By-ACLs", "true")
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			put(t, c, "pins/prod/web/app", "v1")
			f := newFront(t, c)
			var lies atomic.Int64
			views := kvtest.Watch(t, open(t, consul.Config{Client: f.config("")}), "pins/prod/web/")
			views.Await(t, "the pin", kvtest.Healthy("app=v1"))
			f.setRewrite(func(r *http.Response) {
				if isStale(r.Request) && lies.Add(1) <= 3 {
					tt.rewrite(r)
				}
			})
			put(t, c, "pins/prod/web/app", "v2")
			views.Await(t, "the truth", kvtest.Healthy("app=v2"))
			kvtest.Await(t, "the watch to block again", func() error {
				if lies.Load() == 0 {
					return errors.New("nobody asked")
				}
				return nil
			})
			put(t, c, "pins/prod/web/app", "v3")
			views.Await(t, "a later change", kvtest.Healthy("app=v3"))
			views.Never(t, "a refusal without the leader's word", func(v kv.View) bool { return errors.Is(v.Err, kv.ErrDenied) })
			views.Never(
				t,
				"a lie was believed",
				func(v kv.View) bool { return len(v.Entries) != 1 || string(v.Entries[0].Value) == "old" },
			)
			if said := slices.ContainsFunc(views.All(), kvtest.Troubled(kv.ErrUnavailable, "app=v1")); said != tt.trouble {
				t.Errorf("the view told of trouble: %v", said)
			}
			for _, r := range f.requests() {
				q := r.URL.Query()
				if q.Has("wait") && (q.Get("index") == "" || q.Get("index") == "0") {
					t.Errorf("a query with a wait had the index %q, which doesn't wait", q.Get("index"))
				}
			}
		})
	}
}

// A watch that has nothing to do asks once a wait, whatever is written elsewhere.
func TestIdleWatch(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/", "elsewhere/")
	f := newFront(t, c)
	views := kvtest.Watch(t, open(t, consul.Config{Client: f.config("")}), "pins/prod/web/")
	views.Await(t, "the start", kvtest.Healthy(""))
	var asked []*http.Request
	kvtest.Await(t, "the blocking query", func() error {
		if asked = append(asked, f.requests()...); len(asked) < 2 {
			return errors.New("not yet")
		}
		return nil
	})
	for i := range 200 {
		put(t, c, "elsewhere/k", string(rune('a'+i%26)))
	}
	if n := len(append(asked, f.requests()...)); n != 2 {
		t.Fatalf("%d requests while only other keys were written, want one read and one blocking query", n)
	}

	// A folder that nobody made wakes on every write anywhere; that must not become a busy loop.
	g := newFront(t, c)
	blind := kvtest.Watch(t, open(t, consul.Config{Client: g.config("")}), "pins/prod/none/")
	blind.Await(t, "the error", kvtest.Troubled(kv.ErrDenied, ""))
	for i := range 200 {
		put(t, c, "elsewhere/k", string(rune('a'+i%26)))
	}
	if n := len(g.requests()); n > 20 {
		t.Fatalf("%d requests for a prefix without a folder", n)
	}
	// Consul adds up to a sixteenth to the wait, and proxies mostly cut at 60 s.
	wait, err := time.ParseDuration(asked[1].URL.Query().Get("wait"))
	if err != nil || wait < 30*time.Second || wait*17/16 >= 60*time.Second {
		t.Errorf("a wait of %v, %v", wait, err)
	}
}

// A server that answers at once and never changes must not be asked in a busy loop.
func TestBusyServer(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	f := newFront(t, c)
	var index atomic.Int64
	index.Store(1 << 40)
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		// Passed on without the wait, so it never blocks.
		q := r.URL.Query()
		q.Del("wait")
		q.Del("index")
		r.URL.RawQuery = q.Encode()
		return false
	})
	f.setRewrite(func(r *http.Response) { // with an index that grows all the time
		r.Header.Set("X-Consul-Index", strconv.FormatInt(index.Add(1), 10))
	})
	views := kvtest.Watch(t, open(t, consul.Config{Client: f.config("")}), "pins/prod/web/")
	views.Await(t, "the pin", kvtest.Healthy("app=v1"))
	f.requests()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	<-ctx.Done()
	if n := len(f.requests()); n > 100 {
		t.Fatalf("%d requests in a second", n)
	}
	put(t, c, "pins/prod/web/app", "v2")
	views.Await(t, "the change", kvtest.Healthy("app=v2"))
}

// Reads that succeed between queries that fail at once must not keep the pauses short.
func TestFailingQueries(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")
	f := newFront(t, c)
	f.setAnswer(func(w http.ResponseWriter, r *http.Request) bool { return isStale(r) && status(503)(w, r) })
	views := kvtest.Watch(t, open(t, consul.Config{Client: f.config("")}), "pins/prod/web/")
	views.Await(t, "the trouble", kvtest.Troubled(kv.ErrUnavailable, "app=v1"))
	f.requests()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	<-ctx.Done()
	if n := len(f.requests()); n > 40 {
		t.Fatalf("%d requests in three seconds", n)
	}
	f.setAnswer(nil)
	put(t, c, "pins/prod/web/app", "v2")
	views.Await(t, "the change", kvtest.Healthy("app=v2"))
}

func TestNames(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"127.0.0.1:1":                  "http://127.0.0.1:1",
		"http://127.0.0.1:1/":          "http://127.0.0.1:1",
		"https://consul.example.com/a": "https://consul.example.com/a",
		"unix:///run/x.sock":           "unix:///run/x.sock",
	} {
		s := open(t, consul.Config{Client: &api.Config{Address: address}, Prefix: "team/kedge"})
		if got := s.String(); got != "consul at "+want+", prefix team/kedge/" {
			t.Errorf("the store at %s calls itself %q", address, got)
		}
	}
	for _, bad := range []consul.Config{
		{Prefix: "/kedge/"}, {Prefix: "a/../b"}, {Client: &api.Config{Address: "gopher://127.0.0.1"}},
	} {
		if _, err := consul.Open(bad); err == nil {
			t.Errorf("open took %+v", bad)
		}
	}
}

// Each change of one report brings all of a large fleet's. They are read now and then, and the last one is never
// missed.
func TestLargeAnswersAreSpread(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/", "desired/prod/web/")
	put(t, c, "desired/prod/web/app", "0")
	large := strings.Repeat("x", 128<<10)
	for i := range 8 {
		put(t, c, "status/prod/web/node-"+strconv.Itoa(i), large)
	}
	s := open(t, consul.Config{Client: c.Servers[0].Config(c.RootToken)})
	record := kvtest.Watch(t, s, "desired/prod/web/")
	var answers atomic.Int64
	var last atomic.Value // which is large, and nothing to print
	go func() {
		_ = s.Watch(t.Context(), "status/prod/web/", func(v kv.View) {
			answers.Add(1)
			last.Store(strings.TrimLeft(string(v.Entries[0].Value), "x"))
		})
	}()
	shows := func(want string) {
		t.Helper()
		kvtest.Await(t, "the last report", func() error {
			if got := last.Load(); got != want {
				return fmt.Errorf("it is %v", got)
			}
			return nil
		})
	}
	at := func(last string) func(kv.View) bool {
		return func(v kv.View) bool { return v.Synced && string(v.Entries[0].Value) == last }
	}
	shows("")
	record.Await(t, "the record", at("0"))
	seen := answers.Load()
	const changes = 200
	for i := range changes {
		put(t, c, "status/prod/web/node-0", large+strconv.Itoa(i))
		if i%20 == 0 { // what is small comes at once
			put(t, c, "desired/prod/web/app", strconv.Itoa(i))
			record.Await(t, "the next record", at(strconv.Itoa(i)))
		}
	}
	shows(strconv.Itoa(changes - 1))
	if n := answers.Load() - seen; n > changes/4 {
		t.Errorf("%d changes were read in %d answers", changes, n)
	}
}
