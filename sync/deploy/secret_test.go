package deploy

import (
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/sync/secret"
)

const hidden = "hunter2-is-no-password"

// secretWorld is a world whose releases may read files below one directory.
type secretWorld struct {
	*world
	log logtest.Buffer
}

func newSecretWorld(t *testing.T) *secretWorld {
	w := &secretWorld{world: newWorld(t)}
	w.set(hidden)
	return w
}

func (w *secretWorld) set(value string) {
	w.t.Helper()
	path := w.path("secrets", "db")
	if err := errors.Join(
		os.MkdirAll(filepath.Dir(path), 0o700),
		os.WriteFile(path, []byte(value+"\n"), 0o600),
	); err != nil {
		w.t.Fatal(err)
	}
}

func (w *secretWorld) lose() {
	w.t.Helper()
	if err := os.Remove(w.path("secrets", "db")); err != nil {
		w.t.Fatal(err)
	}
}

// configure gives an agent a reader that has read nothing yet.
func (w *secretWorld) configure(c *Config) {
	c.Log = slog.New(
		slog.NewTextHandler(io.MultiWriter(&w.log, w.t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}),
	)
	reader, err := secret.New([]string{"file:" + w.path("secrets") + "/"}, c.Log)
	if err != nil {
		w.t.Fatal(err)
	}
	c.Secrets = reader
}

// publish writes a release whose hooks note the secret.
func (w *secretWorld) publish(version string, change func(*deployments.Manifest)) deployments.Pointer {
	return w.world.publish(version, func(m *deployments.Manifest) {
		m.Secrets = map[string]deployments.SecretRef{"DB": deployments.SecretRef("file:" + w.path("secrets", "db"))}
		note := func(what string) deployments.Command {
			c := w.hook(what + " $DB")
			c.Run += `; echo "the secret is $DB"`
			return c
		}
		m.Commands = deployments.Commands{
			Pre: []deployments.Command{note("pre")}, Post: []deployments.Command{note("post")},
			Success: []deployments.Command{note("success")}, Failure: []deployments.Command{note("failure")},
		}
		if change != nil {
			change(m)
		}
	})
}

// wantHidden looks for the value in all that is kept, and in an error.
func (w *secretWorld) wantHidden(err error) {
	w.t.Helper()
	if err != nil && strings.Contains(err.Error(), "hunter2") {
		w.t.Errorf("the error shows the secret: %v", err)
	}
	if text := w.log.String(); strings.Contains(text, "hunter2") || !strings.Contains(text, "the secret is ***") {
		w.t.Errorf("the log shows the secret, or no mask:\n%s", text)
	}
	walk := filepath.WalkDir(w.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, w.path("secrets")) {
			return err
		}
		data, err := os.ReadFile(path)
		if strings.Contains(string(data), "hunter2") {
			w.t.Errorf("%s shows the secret", path)
		}
		return err
	})
	if walk != nil {
		w.t.Error(walk)
	}
}

// A secret's value reaches commands and exec checks, by their environment, and shows nowhere else.
func TestSecretsReachCommandsAlone(t *testing.T) {
	t.Parallel()
	w := newSecretWorld(t)
	u := w.open(w.configure)
	w.deploy(u, w.publish("1", func(m *deployments.Manifest) {
		m.Health.Checks = []deployments.Check{{Exec: `test "${#DB}" -ge 22`}}
	}))
	w.wantHooks("pre "+hidden+" 1", "post "+hidden+" 1", "success "+hidden+" 1")
	w.wantHidden(nil)

	// A release sees the value of its time, not what one before it saw.
	w.set(hidden + "-2")
	err := u.Deploy(t.Context(), Request{Release: w.publish("2", func(m *deployments.Manifest) {
		m.Health.Timeout = 300 * time.Millisecond
		m.Health.Checks = []deployments.Check{{Exec: `echo "$DB"; exit 1`}}
	})})
	if failed := new(Failed); !errors.As(err, &failed) || !strings.Contains(err.Error(), "***") {
		t.Errorf("it didn't fail, or its reason hides nothing: %v", err)
	}
	two := hidden + "-2"
	// Going back, the release before sees the newest value that was read.
	w.wantHooks("pre "+two+" 2", "post "+two+" 2", "post "+two+" 1", "failure "+two+" 2")
	w.wantHidden(err)
}

// Nothing is read, and nothing touched, for a reference that the node doesn't allow.
func TestSecretsThatTheNodeDoesNotAllow(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Config){"none is": nil, "another is": func(c *Config) {
		c.Secrets, _ = secret.New([]string{"ssm:/prod/"}, slog.New(slog.DiscardHandler))
	}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newSecretWorld(t)
			u := w.open(change)
			p := w.publish("1", nil)
			for what, err := range map[string]error{"stage": u.Stage(t.Context(), p), "deploy": u.Deploy(t.Context(), Request{Release: p})} {
				if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "agent.yaml") {
					t.Errorf("%s: %v", what, err)
				}
			}
			if s := u.State(); !s.Empty() || !s.Staged.IsZero() {
				t.Errorf("%+v", s)
			}
			c := w.config()
			if err := Once(
				t.Context(),
				OneShot{URL: p.URL, Objects: object.New(object.Config{}), Log: c.Log},
			); !errors.Is(
				err,
				ErrRefused,
			) {
				t.Errorf("run: %v", err)
			}
			w.wantHooks()
		})
	}
}

// A secret that can't be read is no fault of the release: before the switch nothing is touched, after a crash the
// deployment waits for it, and nothing goes into quarantine.
func TestSecretsThatCannotBeRead(t *testing.T) {
	t.Parallel()
	w := newSecretWorld(t)
	u := w.open(w.configure)
	one, two := w.publish("1", nil), w.publish("2", nil)
	w.deploy(u, one)
	w.hooks()
	w.lose()
	if err := u.Deploy(t.Context(), Request{Release: two}); !errors.Is(err, ErrSecretUnavailable) {
		t.Errorf("got %v", err)
	}
	if s := u.State(); s.Running != one || s.Unfinished || s.Drained || len(s.Quarantined) > 0 {
		t.Errorf("%+v", s)
	}
	w.set(hidden)

	w.cut(u, two, "before post")
	w.hooks()
	w.lose()
	for range maxCutOff + 1 { // a restart while it waits is no cut-off
		u = w.open(w.configure)
		if err := u.Recover(t.Context()); !errors.Is(err, ErrSecretUnavailable) {
			t.Errorf("got %v", err)
		}
	}
	if s := u.State(); s.Running != two || !s.Unfinished || len(s.Quarantined) > 0 {
		t.Errorf("%+v", s)
	}
	w.wantHooks()
	w.set(hidden)
	if err := u.Recover(t.Context()); err != nil {
		t.Error(err)
	}
	w.wantHooks("post "+hidden+" 2", "success "+hidden+" 2")

	// Cut off before its switch, it is taken back, by the commands of what ran.
	three := w.publish("3", nil)
	w.cut(u, three, "before pre")
	w.hooks()
	w.lose()
	u = w.open(w.configure)
	if err := u.Recover(t.Context()); !errors.Is(err, ErrSecretUnavailable) {
		t.Errorf("got %v", err)
	}
	w.set(hidden)
	if err := u.Recover(t.Context()); err != nil {
		t.Error(err)
	}
	if s := u.State(); s.Running != two || s.Unfinished || s.Drained || len(s.Quarantined) > 0 {
		t.Errorf("%+v", s)
	}
	w.hooks()
	w.wantHidden(nil)
}

// An outage of where secrets are makes no running node unhealthy: after a restart of its agent an exec check that
// can't be tried says nothing, and then says what it finds.
func TestOutageOfSecretsLeavesHealth(t *testing.T) {
	t.Parallel()
	w := newSecretWorld(t)
	u := w.open(w.configure)
	w.deploy(u, w.publish("1", func(m *deployments.Manifest) {
		m.Health.Checks = []deployments.Check{{Exec: `test "${#DB}" = 22`}}
	}))
	w.lose()
	u = w.reopen(w.configure)
	m, err := u.Monitor()
	if err != nil {
		t.Fatal(err)
	}
	if r := m.round(t.Context()); r.err != nil {
		t.Errorf("a check that can't be tried: %v", r.err)
	}
	w.set("another value")
	if r := m.round(t.Context()); r.err == nil {
		t.Error("a check that fails with the value passes")
	}
}

// kedge run reads secrets, too.
func TestRunReadsSecrets(t *testing.T) {
	t.Parallel()
	w := newSecretWorld(t)
	c := w.config()
	w.configure(&c)
	run := func(p deployments.Pointer) error {
		return Once(t.Context(), OneShot{URL: p.URL, Objects: c.Objects, Secrets: c.Secrets, Log: c.Log})
	}
	if err := run(w.publish("1", nil)); err != nil {
		t.Error(err)
	}
	w.wantHooks("pre "+hidden+" 1", "post "+hidden+" 1", "success "+hidden+" 1")
	err := run(
		w.publish(
			"2",
			func(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: `echo "$DB"; exit 1`}} },
		),
	)
	if err == nil {
		t.Error("it didn't fail")
	}
	w.hooks()
	w.wantHidden(err)
	w.lose()
	fresh, _ := secret.New([]string{"file:" + w.path("secrets") + "/"}, c.Log)
	c.Secrets = fresh
	if err := run(w.publish("3", nil)); !errors.Is(err, ErrSecretUnavailable) {
		t.Errorf("without the file: %v", err)
	}
	w.wantHooks("failure  3") // with no secret at all
	w.wantHidden(nil)
}
