package deployments_test

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// The rules that operators install, on a real Consul that denies by default and guards listing as well.
func TestConsulRules(t *testing.T) {
	t.Parallel()
	cluster := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true, Clients: []string{"web-1"}, Config: "acl { enable_key_list_policy = true }"})
	root := cluster.Open(cluster.RootToken)
	for _, kind := range []string{"desired/", "pins/", "status/", "control/", "history/", "mirror/"} {
		folders := []string{kind}
		if kind != "mirror/" {
			folders = append(folders, kind+"prod/web/", kind+"prod/db/")
		}
		if err := root.EnsureFolders(t.Context(), folders...); err != nil {
			t.Fatal(err)
		}
	}
	server, client := cluster.Servers[0], cluster.Clients[0]
	for _, p := range []struct {
		party          string
		vars           deployments.RuleVars
		node           *kvtest.ConsulNode
		reads, writes  []string
		hidden, locked []string
	}{
		{
			party: "agent", vars: deployments.RuleVars{Stage: "prod", Role: "web", Node: "web-1"}, node: client,
			reads:  []string{"desired/prod/web/", "pins/prod/web/"},
			hidden: []string{"desired/prod/db/", "pins/prod/db/", "status/prod/web/", "control/prod/web/", "history/prod/web/", "mirror/"},
			writes: []string{"status/prod/web/web-1"},
			locked: []string{
				"status/prod/web/web-2", "status/prod/web/web-10", "status/prod/db/web-1", "desired/prod/web/app", "pins/prod/web/app",
				"pins/prod/web/app/web-1", "control/prod/web/app", "history/prod/web/app/1", "mirror/state", "mirror/lease", "mirror/hook",
			},
		},
		{
			party: "mirror", vars: deployments.RuleVars{Node: server.Name}, node: server,
			reads:  []string{"desired/", "pins/", "status/", "control/", "history/", "mirror/", "history/prod/web/"},
			writes: []string{"desired/prod/web/app", "history/prod/web/app/1", "mirror/state", "mirror/hook", "control/prod/web/app"},
			locked: []string{"elsewhere/prod"},
		},
		{
			party: "operator", node: server,
			reads:  []string{"desired/", "pins/", "status/", "control/", "history/", "mirror/", "pins/prod/web/"},
			writes: []string{"pins/prod/web/app", "pins/prod/web/app/web-1", "control/prod/web/app"},
			locked: []string{"desired/prod/web/app", "status/prod/web/web-1", "history/prod/web/app/1", "mirror/state", "mirror/lease", "mirror/hook"},
		},
		{
			party: "web", node: server,
			reads:  []string{"desired/", "pins/", "status/", "control/", "history/", "mirror/", "pins/prod/web/"},
			locked: []string{"pins/prod/web/app", "control/prod/web/app", "desired/prod/web/app", "status/prod/web/web-1", "mirror/state"},
		},
	} {
		t.Run(p.party, func(t *testing.T) {
			token := cluster.Token(deployments.ConsulRules(p.party, p.vars))
			store := p.node.Open(token)
			for _, prefix := range p.reads {
				if _, err := store.List(t.Context(), prefix); err != nil {
					t.Errorf("may not list %s: %v", prefix, err)
				}
			}
			for _, prefix := range p.hidden {
				if _, err := store.List(t.Context(), prefix); !errors.Is(err, kv.ErrDenied) {
					t.Errorf("may list %s: %v", prefix, err)
				}
			}
			for _, key := range p.writes {
				if err := store.Commit(t.Context(), nil, kv.Put(key, []byte("x"))); err != nil {
					t.Errorf("may not write %s: %v", key, err)
				}
				if err := store.Commit(t.Context(), nil, kv.Delete(key)); err != nil {
					t.Errorf("may not delete %s: %v", key, err)
				}
			}
			for _, key := range p.locked {
				if err := store.Commit(t.Context(), nil, kv.Put(key, []byte("x"))); !errors.Is(err, kv.ErrDenied) {
					t.Errorf("may write %s: %v", key, err)
				}
			}
			for _, node := range cluster.Nodes() {
				_, _, err := node.Client(token).Session().Create(&api.SessionEntry{TTL: "10s", LockDelay: time.Millisecond}, nil)
				if may := err == nil; may != (node.Name == p.vars.Node) {
					t.Errorf("session on %s: %v", node.Name, err)
				}
			}
		})
	}

	t.Run("the agent's report is held by its node", func(t *testing.T) {
		vars := deployments.RuleVars{Stage: "prod", Role: "web", Node: "web-1"}
		for range 2 { // the second is a restart: it takes the entry over from the first
			store := client.Open(cluster.Token(deployments.ConsulRules("agent", vars)))
			presence, err := store.Presence(t.Context(), "web-1")
			if err != nil {
				t.Fatal(err)
			}
			defer presence.Close(t.Context())
			if err := presence.Put(t.Context(), "status/prod/web/web-1", []byte("{}")); err != nil {
				t.Fatal(err)
			}
			if err := presence.Put(t.Context(), "status/prod/web/web-2", []byte("{}")); !errors.Is(err, kv.ErrDenied) {
				t.Errorf("an agent speaks for another: %v", err)
			}
		}
		entry, err := root.Get(t.Context(), "status/prod/web/web-1")
		if err != nil || entry.Session == "" {
			t.Errorf("the report is %+v, %v; want it held by a session", entry, err)
		}
	})
	t.Run("the mirror makes folders, and writes under its lease", func(t *testing.T) {
		store := server.Open(cluster.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: server.Name})))
		lease, err := store.Lease(t.Context(), kv.MirrorLease, "mirror-1", 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"desired/", "pins/", "status/", "control/", "history/"} {
			if err := store.EnsureFolders(t.Context(), kind+"prod/new/"); err != nil {
				t.Error(err)
			}
		}
		if err := store.Commit(t.Context(), lease, kv.Put("desired/prod/new/app", []byte("x")), kv.Put("mirror/state", []byte("{}"))); err != nil {
			t.Error(err)
		}
		if err := lease.Release(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("another prefix", func(t *testing.T) {
		store, err := consul.Open(consul.Config{Prefix: "ship/a/", Client: server.Config(cluster.Token(deployments.ConsulRules("operator", deployments.RuleVars{Prefix: "ship/a/"})))})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		if err := store.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("hold"))); err != nil {
			t.Error(err)
		}
	})
}

// Rules with a variable left out, or with one that would end its string, would be about other keys than meant.
func TestConsulRulesRefuseBadVariables(t *testing.T) {
	t.Parallel()
	for name, rules := range map[string]func() string{
		"no such party": func() string { return deployments.ConsulRules("../systemd/x", deployments.RuleVars{}) },
		"no stage": func() string {
			return deployments.ConsulRules("agent", deployments.RuleVars{Role: "web", Node: "web-1"})
		},
		"no node": func() string { return deployments.ConsulRules("mirror", deployments.RuleVars{}) },
		"a quote": func() string {
			return deployments.ConsulRules("mirror", deployments.RuleVars{Node: `a" {} key_prefix "`})
		},
		"a bad prefix": func() string { return deployments.ConsulRules("operator", deployments.RuleVars{Prefix: `"`}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: taken", name)
				}
			}()
			rules()
		}()
	}
	if rules := deployments.ConsulRules("agent", deployments.RuleVars{Stage: "prod", Role: "web", Node: "web-1"}); strings.ContainsAny(rules, "$#") {
		t.Errorf("the rules have more than rules in them:\n%s", rules)
	}
}

// What the README shows a newcomer is taken as it stands.
func TestExample(t *testing.T) {
	t.Parallel()
	tree, err := deployments.Load(os.DirFS("example/repo"))
	if err != nil {
		t.Fatal(err)
	}
	var units []string
	for _, u := range tree.Units {
		units = append(units, u.ID.String())
	}
	if want := []string{"prod/web/app", "prod/web/base", "staging/web/app"}; !slices.Equal(units, want) {
		t.Errorf("units %v, want %v", units, want)
	}
	app := tree.Units[0]
	if app.Rollout == nil || app.Rollout.Bake != 5*time.Minute || !slices.Equal(app.After, []string{"base"}) {
		t.Errorf("prod/web/app is %+v with the rollout %+v", app, app.Rollout)
	}
	s := tree.Settings
	if len(s.Freeze) != 1 || len(s.Sources) != 2 || len(s.Dests) != 1 || !s.Commands["*"] || !s.Prune {
		t.Errorf("the settings are %+v", s)
	}
}

// User data that doesn't parse is passed over by cloud-init, and the node boots into nothing.
func TestUserData(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("cloud-init/user-data.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var user struct {
		Files []struct {
			Path        string `yaml:"path"`
			Permissions string `yaml:"permissions"`
			Content     string `yaml:"content"`
		} `yaml:"write_files"`
		Run []any `yaml:"runcmd"`
	}
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&user); err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(data, []byte("#cloud-config\n")) || len(user.Run) == 0 || len(user.Files) != 1 {
		t.Fatalf("%+v", user)
	}
	env := user.Files[0]
	if env.Path != "/etc/kedge/agent.env" || env.Permissions != "0600" {
		t.Errorf("%s has permissions %s", env.Path, env.Permissions)
	}
	unit, err := os.ReadFile("systemd/kedge-agent.service")
	if err != nil || !bytes.Contains(unit, []byte("EnvironmentFile=-"+env.Path+"\n")) {
		t.Errorf("the agent's unit does not read %s: %v", env.Path, err)
	}
	for line := range strings.Lines(env.Content) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok || value == "" || strings.ToUpper(name) != name || strings.Contains(name, "TOKEN") && !strings.HasSuffix(name, "_FILE") {
			t.Errorf("%s: want NAME=VALUE, and no secret", line)
		}
	}
}
