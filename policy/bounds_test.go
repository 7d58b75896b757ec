package policy

import (
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"kedge/deployments"
)

// What a release does that bounds forbid, each field of a manifest that could do it in turn.
func TestBoundsNeedManifest(t *testing.T) {
	t.Parallel()
	p := release("a")
	run := func(c ...deployments.Command) []deployments.Command { return c }
	whole := func() deployments.Manifest {
		return deployments.Manifest{
			Src: "s3://acme/web/a.tar", Dest: "/srv/app", Owner: "app:www",
			Index:    &deployments.Blob{URL: "s3://acme/web/a.index"},
			Deltas:   []deployments.Delta{{Blob: deployments.Blob{URL: "s3://acme/web/a.delta"}}},
			Commands: deployments.Commands{Pre: run(deployments.Command{Run: "true", User: "app"})},
		}
	}
	p.URL = "s3://acme/web/manifest.yaml"
	names := func(user string) []string {
		if user == "" {
			return []string{"root", "0"}
		}
		if group, ok := strings.CutPrefix(user, ":"); ok {
			return map[string][]string{"www": {"www", "33", "app"}, "adm": {"adm", "4"}, "0": {"root", "0"}}[group]
		}
		return []string{user}
	}
	web := Bounds{Sources: []string{"s3://acme/web"}, Dests: []string{"/srv", "/opt/kedge"}, Users: []string{"app"}}
	for _, c := range []struct {
		name   string
		bounds Bounds
		change func(*deployments.Manifest)
		says   string // empty: allowed
	}{
		{"nothing bounded", Bounds{}, func(m *deployments.Manifest) { m.Dest, m.Src = "/etc", "https://elsewhere/x" }, ""},
		{"all as bounded", web, func(*deployments.Manifest) {}, ""},
		{"the directory itself", web, func(m *deployments.Manifest) { m.Dest = "/opt/kedge" }, ""},
		{"a dest beside it", web, func(m *deployments.Manifest) { m.Dest = "/srvx/app" }, "dest /srvx/app is outside of /srv, /opt/kedge"},
		{"a dest above it", web, func(m *deployments.Manifest) { m.Dest = "/" }, "is outside of"},
		{"a dest through it", web, func(m *deployments.Manifest) { m.Dest = "/srv/../etc" }, "is outside of"},
		{"no tree, so no dest", web, func(m *deployments.Manifest) { m.Src, m.Dest = "", "" }, ""},
		{"src", web, func(m *deployments.Manifest) { m.Src = "s3://acme/other/a.tar" }, "s3://acme/other/a.tar is not from s3://acme/web"},
		{"index", web, func(m *deployments.Manifest) { m.Index.URL = "https://e/i" }, "https://e/i is not from"},
		{"a delta", web, func(m *deployments.Manifest) { m.Deltas[0].URL = "https://e/d" }, "https://e/d is not from"},
		{"owner", web, func(m *deployments.Manifest) { m.Owner = "root" },
			"owner: user root is not among those allowed: app"},
		{"a group alone", web, func(m *deployments.Manifest) { m.Owner = ":www" }, ""},
		{"a group that none of the users is in", web, func(m *deployments.Manifest) { m.Owner = "app:adm" },
			"owner: group adm is not among those allowed: app"},
		{"root's group", web, func(m *deployments.Manifest) { m.Owner = ":0" },
			"owner: group 0 is not among those allowed: app"},
		{"root's group, where nothing of groups is known", web, func(m *deployments.Manifest) { m.Owner = ":root" },
			"owner: group root is not among those allowed: app"},
		{"a group of which nothing is known", web, func(m *deployments.Manifest) { m.Owner = ":other" }, ""},
		{"a command's user", web, func(m *deployments.Manifest) {
			m.Commands.Failure = run(deployments.Command{Run: "x", User: "root"})
		}, `command "x": user root is not among those allowed: app`},
		{"a command without a user", web, func(m *deployments.Manifest) { m.Commands.Success = run(deployments.Command{Run: "x"}) }, "it runs as the agent's own user, which is not among app: set user"},
		{"the agent's own user, by number", Bounds{Users: []string{"0", "app"}}, func(m *deployments.Manifest) { m.Commands.Post = run(deployments.Command{Run: "x"}) }, ""},
		{"a check that runs something", web, func(m *deployments.Manifest) { m.Health.Checks = []deployments.Check{{Exec: "x"}} }, "agent's own user"},
		{"a check that runs something as one of the users", web, func(m *deployments.Manifest) {
			m.Health.Checks = []deployments.Check{{Exec: "x", User: "app"}}
		}, ""},
		{"a check that runs something as another", web, func(m *deployments.Manifest) {
			m.Health.Checks = []deployments.Check{{Exec: "x", User: "root"}}
		}, `command "x": user root is not among those allowed: app`},
		{"no commands", Bounds{NoCommands: true}, func(*deployments.Manifest) {},
			`the manifest has commands, and none are allowed: "true"`},
		{"no commands, but a check", Bounds{NoCommands: true}, func(m *deployments.Manifest) {
			m.Commands.Pre, m.Health.Checks = nil, []deployments.Check{{TCP: "h:1"}, {Exec: "y"}}
		}, `none are allowed: "y"`},
		{"no commands, and there are none", Bounds{NoCommands: true}, func(m *deployments.Manifest) { m.Commands.Pre = nil }, ""},
	} {
		m := whole()
		c.change(&m)
		err := c.bounds.Check(p, &m, names)
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

func TestBoundsOf(t *testing.T) {
	t.Parallel()
	tree, err := deployments.Load(fstest.MapFS{"kedge.yaml": {Data: []byte(`
sources: {"*": [s3://acme], prod: [s3://acme/prod]}
dests: {prod: [/srv, /opt]}
users: {"*": app}
commands: {"*": false, dev: true}
`)}})
	if err != nil {
		t.Fatal(err)
	}
	for stage, want := range map[string]Bounds{
		"prod": {Sources: []string{"s3://acme/prod"}, Dests: []string{"/srv", "/opt"}, Users: []string{"app"}, NoCommands: true},
		"dev":  {Sources: []string{"s3://acme"}, Users: []string{"app"}},
		"test": {Sources: []string{"s3://acme"}, Users: []string{"app"}, NoCommands: true},
	} {
		got := BoundsOf(tree.Settings, stage)
		if !slices.Equal(got.Sources, want.Sources) || !slices.Equal(got.Dests, want.Dests) || !slices.Equal(got.Users, want.Users) || got.NoCommands != want.NoCommands {
			t.Errorf("%s: %+v, want %+v", stage, got, want)
		}
		if !got.NeedManifest() {
			t.Errorf("%s: nothing of its manifests is bounded", stage)
		}
	}
	if b := BoundsOf(deployments.Settings{Sources: map[string][]string{"*": {"s3://acme"}},
		Commands: map[string]bool{"*": true}}, "prod"); b.NeedManifest() || b.NoCommands {
		t.Errorf("%+v takes a look at manifests", b)
	}
}

// An agent takes nothing from its own machine unless its configuration names it.
func TestLocalSources(t *testing.T) {
	t.Parallel()
	named := []string{"file:///srv/releases", "http://127.0.0.1:9000/releases", "s3://acme"}
	for _, c := range []struct {
		url    string
		bounds Bounds
		ok     bool
	}{
		{"file:///etc/shadow", Bounds{NoLocal: true}, false},
		{"http://127.0.0.1:8500/v1/kv/x", Bounds{NoLocal: true}, false},
		{"http://localhost/x", Bounds{NoLocal: true, Sources: []string{"s3://acme"}}, false},
		{"s3://acme/x", Bounds{NoLocal: true}, true},
		{"https://releases.example/x", Bounds{NoLocal: true}, true},
		{"https://10.0.0.7/x", Bounds{NoLocal: true}, true},
		{"https://localhost:8501/x", Bounds{NoLocal: true}, false},
		{"https://LocalHost./x", Bounds{NoLocal: true}, false},
		{"https://kedge.localhost/x", Bounds{NoLocal: true}, false},
		{"https://127.9.9.9/x", Bounds{NoLocal: true}, false},
		{"https://0.0.0.0/x", Bounds{NoLocal: true}, false},
		{"https://[::]/x", Bounds{NoLocal: true}, false},
		{"https://[::1]/x", Bounds{NoLocal: true}, false},
		{"https://[::ffff:7f00:1]/x", Bounds{NoLocal: true}, false},
		{"https://169.254.169.254/x", Bounds{NoLocal: true}, false},
		{"https://[fe80::1%25lo]/x", Bounds{NoLocal: true}, false},
		{"https://[fd00:ec2::254]/x", Bounds{NoLocal: true}, false},
		{"https://localhost:8501/x", Bounds{NoLocal: true, Sources: []string{"https://localhost:8501"}}, true},
		{"https://localhost:8501/x", Bounds{}, true},
		{"file:///srv/releases/x", Bounds{NoLocal: true, Sources: named}, true},
		{"file:///srv/releases/../../etc/shadow", Bounds{NoLocal: true, Sources: named}, false},
		{"http://127.0.0.1:9000/releases/x", Bounds{NoLocal: true, Sources: named}, true},
		{"http://127.0.0.1:8500/releases/x", Bounds{NoLocal: true, Sources: named}, false},
		{"file:///etc/shadow", Bounds{Sources: named}, false},
		{"file:///etc/shadow", Bounds{}, true},
		// Plain http of another machine is taken from no one but whom sources name.
		{"http://artifacts.internal/app.tar", Bounds{}, false},
		{"http://artifacts.internal/app.tar", Bounds{Sources: []string{"https://artifacts.internal/"}}, false},
		{"http://artifacts.internal/app.tar", Bounds{Sources: []string{"http://artifacts.internal/"}}, true},
		{"http://artifacts.internal/app.tar", Bounds{NoLocal: true, Sources: []string{"http://artifacts.internal/"}}, true},
		{"http://artifacts.internal.evil/app.tar", Bounds{Sources: []string{"http://artifacts.internal/"}}, false},
	} {
		if err := c.bounds.CheckSource(c.url); (err == nil) != c.ok {
			t.Errorf("%s within %+v: %v", c.url, c.bounds, err)
		}
	}
}
