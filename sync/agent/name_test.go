package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// namer is a store whose agent gives these answers in order, and then repeats the last.
type namer struct {
	kv.Store
	mu      sync.Mutex
	answers []any
}

func (n *namer) NodeName(context.Context) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	answer := n.answers[0]
	if len(n.answers) > 1 {
		n.answers = n.answers[1:]
	}
	if err, ok := answer.(error); ok {
		return "", fmt.Errorf("the agent: %w", err)
	}
	return answer.(string), nil
}

// away is a store that can't be read while down is set.
type away struct {
	kv.Store
	down error
}

func (s away) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if s.down != nil {
		return nil, s.down
	}
	return s.Store.List(ctx, prefix)
}

func hostname(t *testing.T) string {
	t.Helper()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func TestFindName(t *testing.T) {
	t.Parallel()
	host := hostname(t)
	short, _, _ := strings.Cut(host, ".")
	answers := func(all ...any) []any { return all }
	for name, c := range map[string]struct {
		saved   string // what the disk has
		answers []any
		down    error // the rest of the store is so, too
		want    string
		keeps   string
	}{
		"what the store's agent says":                 {"", answers("i-0abc"), nil, "i-0abc", "i-0abc"},
		"which isn't up at once":                      {"", answers(kv.ErrUnavailable, kv.ErrUnavailable, "i-0abc"), kv.ErrUnavailable, "i-0abc", "i-0abc"},
		"which doesn't know the token yet":            {"", answers(kv.ErrDenied, "i-0abc"), kv.ErrDenied, "i-0abc", "i-0abc"},
		"which doesn't know what the servers know":    {"", answers(kv.ErrTokenUnknown, kv.ErrTokenUnknown, "i-0abc"), nil, "i-0abc", "i-0abc"},
		"which may not be asked":                      {"", answers(kv.ErrDenied), nil, short, ""},
		"which came up between two questions":         {"", answers(kv.ErrUnavailable, "i-0abc"), nil, "i-0abc", "i-0abc"},
		"which is behind something that can't":        {"", answers(kv.ErrUnavailable), nil, short, ""},
		"which nobody knows":                          {"", answers(kv.ErrNotFound), kv.ErrUnavailable, short, ""},
		"which is away, and said so before":           {host, answers(kv.ErrUnavailable), kv.ErrUnavailable, "saved", "saved"},
		"which doesn't say any more":                  {host, answers(kv.ErrDenied), nil, "saved", "saved"},
		"which has another name for it by now":        {host, answers("web-1"), nil, "web-1", "web-1"},
		"which told another host, whose disk this is": {"image-builder", answers(kv.ErrDenied), nil, short, "saved"},
		"which is another machine's":                  {"", answers(""), nil, short, ""},
		"whose name can't be part of a key":           {"", answers("a/b"), nil, short, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			file := w.path("state", "node.json")
			if c.saved != "" {
				if err := os.MkdirAll(w.path("state"), 0o700); err != nil {
					t.Fatal(err)
				}
				write(t, file, fmt.Sprintf(`{"host":%q,"node":"saved"}`, c.saved))
			}
			w.put(kv.DesiredKey(app), w.publish("app", "1").String())
			a := w.start(func(config *Config) {
				config.Node, config.Store = "", &namer{Store: away{w.store, c.down}, answers: c.answers}
			})
			await(t, "the report", func() (bool, string) {
				e, err := w.store.Get(t.Context(), kv.StatusKey("prod", "web", c.want))
				if err != nil {
					return false, err.Error()
				}
				r, err := deployments.ParseReport(e.Value)
				return err == nil && r.Node == c.want && r.Units["app"].State == deployments.StateConverged, string(e.Value)
			})
			if got := a.Node(); got != c.want {
				t.Errorf("it goes by %q", got)
			}
			all, err := w.store.List(t.Context(), kv.StatusPrefix)
			if err != nil || len(all) != 1 {
				t.Errorf("it reports more than once: %v, %v", all, err)
			}
			if data, _ := os.ReadFile(file); c.keeps == "" && len(data) > 0 || c.keeps != "" && !strings.Contains(string(data), `"node":"`+c.keeps+`"`) {
				t.Errorf("it keeps %s", data)
			}
			a.stop()
		})
	}
}

// While this node's name is unknown, its status says that the rest of its state is unknown.
func TestUnnamedNodeSaysWhy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	snapshot := make(chan struct{}, 1)
	a := w.start(func(config *Config) {
		config.Listen, config.Node, config.Store = "127.0.0.1:0", "", &namer{Store: away{w.store, kv.ErrUnavailable}, answers: []any{kv.ErrUnavailable}}
		config.Snapshot = func(context.Context) ([]kv.Entry, error) {
			select {
			case snapshot <- struct{}{}:
			default:
			}
			return nil, kv.ErrUnavailable
		}
	})
	await(t, "why it isn't ready", func() (bool, string) {
		code, body := a.get("/ready")
		return code == 503 && strings.Contains(body, "this node's name isn't known yet"), body
	})
	select {
	case <-snapshot:
	case <-time.After(patience):
		t.Error("nobody looks for a snapshot")
	}
}

// gated is a store whose agent tells the node's name late.
type gated struct {
	kv.Store
	name string
	open chan struct{}
}

func (g gated) NodeName(ctx context.Context) (string, error) {
	select {
	case <-g.open:
		return g.name, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// A node that learns its name after it began with its last known state uses that name from then on, and doesn't
// take the pins remembered under another name for its own.
func TestNameThatComesLate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("app", "2", post("echo $KEDGE_NODE > "+w.path("node")))
	w.put(kv.DesiredKey(app), two.String())
	w.put(kv.NodePinKey(app, node), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	a.stop()

	store := gated{w.store, "i-0abc", make(chan struct{})}
	pins := make(chan struct{})
	w.put(kv.NodePinKey(app, "i-0abc"), one.String())
	a = w.start(func(c *Config) {
		c.Node, c.Store = "", slowPins{Store: store, Namer: store, open: pins}
		write(t, filepath.Join(c.StateDir, "node.json"), fmt.Sprintf(`{"host":%q,"node":%q}`, hostname(t), node))
	})
	a.awaitRunning(app, one)
	close(store.open)
	await(t, "its name", func() (bool, string) { return a.Node() == "i-0abc", a.Node() })
	steadily(t, "its pins aren't known", func() (bool, string) {
		a.changed.Set()
		return w.live("app") == "1", w.live("app")
	})
	close(pins)
	await(t, "its pins", func() (bool, string) {
		return a.Status().Decisions["web/app"].Source == policy.FromNodePin, w.log.String()
	})
	w.delete(kv.NodePinKey(app, "i-0abc"))
	a.awaitRunning(app, two)
	if data, err := os.ReadFile(w.path("node")); err != nil || string(data) != "i-0abc\n" {
		t.Errorf("a command was told that it runs on %q, %v", data, err)
	}
}
