package mirror

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git"
	"kedge/sync/git/gittest"
)

func TestOnlySignedCommitsAreTaken(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	dir := t.TempDir()
	store := dirStore(t)
	signers := filepath.Join(dir, "signers")
	gittest.WriteFile(
		t,
		signers,
		"# who may deploy\nada@example.com namespaces=\"git\" "+o.SignBy(filepath.Join(dir, "ada")),
	)
	root := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: store, Repo: o.Bare, SignedBy: signers})
	m.at(root)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.at(head)
	was := desired(t, store)

	o.Git(o.Work, "config", "commit.gpgsign", "false")
	m.refuses(o.Push(map[string]string{"prod/web/app.yaml": unitFile("evil/1")}), "the commit has no signature")
	sameDesired(t, store, was)

	eve := o.SignBy(filepath.Join(dir, "eve"))
	m.refuses(o.Push(map[string]string{"prod/web/app.yaml": unitFile("evil/2")}), "not among the allowed signers")
	sameDesired(t, store, was)

	// A good signature, moved to another commit.
	raw := o.Git(o.Work, "cat-file", "commit", head)
	forged := strings.Replace(raw, "\n\nDeploy", "\n\nDeploy this", 1)
	gittest.WriteFile(t, filepath.Join(dir, "forged"), forged+"\n")
	hash := o.Git(o.Work, "hash-object", "-t", "commit", "-w", filepath.Join(dir, "forged"))
	o.Git(o.Work, "push", "-q", "-f", "origin", hash+":refs/heads/main")
	m.refuses(hash, "by the key of ada@example.com")
	sameDesired(t, store, was)

	// An old commit with a good signature, force-pushed by somebody without the key.
	o.Git(o.Work, "push", "-q", "-f", "origin", root+":refs/heads/main")
	m.refuses(root, "does not descend")
	sameDesired(t, store, was)

	// The state that the mirror left doesn't allow it either.
	m.stop()
	evil := o.Git(o.Work, "rev-parse", "HEAD")
	o.Git(o.Work, "push", "-q", "-f", "origin", evil+":refs/heads/main")
	put(t, store, "mirror/state", `{"head":"`+evil+`"}`)
	m = start(t, Config{Store: store, Repo: o.Bare, SignedBy: signers})
	m.status(func(s deployments.MirrorState) bool { return s.Refused == evil })
	sameDesired(t, store, was)

	// A signer that is added to the file may sign from then on.
	o.Git(o.Work, "reset", "-q", "--hard", head)
	next := o.ForcePush(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	m.refuses(next, "not among the allowed signers")
	ada, err := exec.Command("ssh-keygen", "-y", "-f", filepath.Join(dir, "ada")).Output()
	if err != nil {
		t.Fatal(err)
	}
	put(t, store, "mirror/state", `{"head":"`+head+`"}`)
	m.stop()
	gittest.WriteFile(t, signers, "ada@example.com "+string(ada)+"eve@example.com "+eve)
	m = start(t, Config{Store: store, Repo: o.Bare, SignedBy: signers})
	m.at(next)
	m.runs("prod/web/app", "app/3")
}

// A mirror that starts after the signer was removed goes on with the taken commit: it restores records, and obeys
// orders.
func TestSignerIsTakenOut(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	dir := t.TempDir()
	store := dirStore(t)
	signers := filepath.Join(dir, "signers")
	gittest.WriteFile(t, signers, "ada@example.com "+o.SignBy(filepath.Join(dir, "ada")))
	c := Config{Store: store, Repo: o.Bare, SignedBy: signers, CacheDir: filepath.Join(dir, "cache")}
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, c)
	m.at(head)
	m.stop()
	eve := o.SignBy(filepath.Join(dir, "eve"))
	gittest.WriteFile(t, signers, "eve@example.com "+eve)
	put(t, store, "desired/prod/web/app", pointer("hand/1").String())
	m = start(t, c)
	m.runs("prod/web/app", "app/1")
	o.SignWith(filepath.Join(dir, "ada"))
	m.refuses(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}), "not among the allowed signers")
	o.SignWith(filepath.Join(dir, "eve"))
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")}))
}

// A mirror without a cache that starts after the signer was removed, while a rollout is under way, obeys orders and
// pins, and continues rollouts. It takes nothing from Git that it can't vouch for: another release under the same
// commit's name, the unit's own settings of the record, a removal; nor does it sign a snapshot.
func TestSignerIsTakenOutAndNothingIsRemembered(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	dir := t.TempDir()
	store := dirStore(t)
	signers := filepath.Join(dir, "signers")
	gittest.WriteFile(t, signers, "ada@example.com "+o.SignBy(filepath.Join(dir, "ada")))
	var snapshots atomic.Int32
	c := Config{Store: store, Repo: o.Bare, SignedBy: signers}
	m := start(t, c)
	files := map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual, "prod/db/pg.yaml": unitFile("pg/1"),
		"prod/db/proxy.yaml": unitFile("proxy/1")}
	m.at(o.Push(files))
	h := newHerd(t, m, 4)
	files["prod/web/app.yaml"] = unitFile("app/2") + gradual + "  approval: manual\n"
	head := o.Push(files)
	m.at(head)
	h.until(deployments.Digest{}, 1, func(r deployments.Record) bool {
		return r.Rollout != nil && r.Rollout.Phase == deployments.PhasePendingApproval
	})
	m.stop()

	gittest.WriteFile(t, signers, "eve@example.com "+o.SignBy(filepath.Join(dir, "eve")))
	byHand := encode(
		deployments.Record{Target: pointer("hand/1"), Generation: 9, Commit: head, Drift: deployments.DriftHeal},
	)
	put(t, store, "desired/prod/db/pg", string(byHand))
	put(t, store, "desired/prod/db/other", string(byHand))
	c.Snapshot = func(context.Context, []kv.Entry) error { snapshots.Add(1); return nil }
	m = start(t, c)
	h.m = m
	m.status(func(s deployments.MirrorState) bool {
		return s.Head == head && s.Refused == head && strings.Contains(s.Error, "not among the allowed signers")
	})
	put(t, store, "control/prod/web/app", "abort\n")
	r, _ := h.until(deployments.Digest{}, 2, func(r deployments.Record) bool {
		return r.Rollout != nil && r.Rollout.Phase == deployments.PhaseRolledBack
	})
	if r.Stable != pointer("app/1") || r.Rollout.Failed != pointer("app/2").Digest {
		t.Errorf("after the abort: %+v", r)
	}
	put(t, store, "control/prod/web/app", "retry\n")
	h.until(deployments.Digest{}, 1, func(r deployments.Record) bool {
		return r.Target == pointer("app/2") && r.Rollout != nil && r.Rollout.Phase == deployments.PhasePendingApproval
	})
	put(t, store, "control/prod/web/app", "promote\n")
	h.until(deployments.Digest{}, 2, func(r deployments.Record) bool {
		return r.Target == pointer("app/2") && r.Rollout == nil
	})
	for _, unit := range []string{"prod/db/pg", "prod/db/other"} {
		if got := desired(t, store)[unit]; got != string(byHand) {
			t.Errorf("%s is %s, though nobody who counts signed the commit", unit, got)
		}
	}
	if n := snapshots.Load(); n > 0 {
		t.Errorf("%d snapshots of what nobody vouches for", n)
	}

	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3") + gradual}))
	m.runs("prod/web/app", "app/3")
	m.runs("prod/db/pg", "pg/1")
	m.await("a snapshot", func() error {
		if snapshots.Load() == 0 {
			return errors.New("there is none")
		}
		return nil
	})
}

// Commits that the real gpg signed: by a key that counts, by another, by one that expired, and SSH signers beside them.
func TestCommitsSignedByOpenPGP(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	dir, err := os.MkdirTemp("", "kedge-gpg-") // short: gpg's agent listens at a socket in it
	if err != nil {
		t.Fatal(err)
	}
	o.Env = append(o.Env, "GNUPGHOME="+dir)
	gpg := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(
			"gpg",
			append([]string{"--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)...)
		cmd.Env = append(os.Environ(), "GNUPGHOME="+dir)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %q: %v", args, err)
		}
		return string(out)
	}
	t.Cleanup(func() {
		cmd := exec.Command("gpgconf", "--kill", "all")
		cmd.Env = append(os.Environ(), "GNUPGHOME="+dir)
		if err := errors.Join(cmd.Run(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	gpg("--quick-gen-key", "Ada <ada@example.com>", "ed25519", "sign", "never")
	gpg("--quick-gen-key", "Eve <eve@example.com>", "ed25519", "sign", "never")
	gpg("--faked-system-time", "20200101T000000", "--quick-gen-key", "Old <old@example.com>", "ed25519", "sign", "1d")
	keys := filepath.Join(dir, "keys.asc")
	gittest.WriteFile(t, keys, gpg("--armor", "--export", "ada@example.com")+gpg("--armor", "--export", "old@example.com"))
	signsAs := func(who string) {
		o.Git(o.Work, "config", "gpg.format", "openpgp")
		o.Git(o.Work, "config", "user.signingkey", who)
		o.Git(o.Work, "config", "commit.gpgsign", "true")
	}
	signers := filepath.Join(dir, "signers")
	gittest.WriteFile(t, signers, "bob@example.com "+o.SignBy(filepath.Join(dir, "bob")))

	signsAs("ada@example.com")
	store := dirStore(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: store, Repo: o.Bare, SignedBy: signers, SignedByPGP: keys})
	m.at(first)
	o.SignWith(filepath.Join(dir, "bob"))
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	was := desired(t, store)

	signsAs("eve@example.com")
	m.refuses(o.Push(map[string]string{"prod/web/app.yaml": unitFile("evil/1")}), "the commit's OpenPGP signature")
	sameDesired(t, store, was)

	// gpg itself would not sign with a key that has expired, but for its clock.
	wrapper := filepath.Join(dir, "gpg-then")
	gittest.WriteFile(t, wrapper, "#!/bin/sh\nexec gpg --faked-system-time 20200101T010000 \"$@\"\n")
	if err := os.Chmod(wrapper, 0o700); err != nil {
		t.Fatal(err)
	}
	o.Git(o.Work, "config", "gpg.program", wrapper)
	signsAs("old@example.com")
	m.refuses(o.Push(map[string]string{"prod/web/app.yaml": unitFile("old/1")}), "expired")
	sameDesired(t, store, was)

	if _, err := New(
		Config{Store: store, Repo: o.Bare, SignedByPGP: signers},
	); err == nil ||
		!strings.Contains(err.Error(), "gpg --armor --export") {
		t.Errorf("a file without keys: %v", err)
	}
}

// A record that the mirror wrote while nobody vouched for its commit comes into the signed snapshot once a commit that
// counts names its unit, but not by being marked as orphaned.
func TestSnapshotsLeaveOutWhatNobodySigned(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"the unit is still there", map[string]string{"prod/web/base.yaml": unitFile("base/1")}, "app base"},
		{"it is gone", map[string]string{"prod/web/app.yaml": "", "prod/web/base.yaml": unitFile("base/1")}, "base"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := gittest.New(t)
			taken := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
			l, store := led(t, o)
			l.snapshot.save = func(context.Context, []kv.Entry) error { return nil }
			l.rebuildWait = 0
			id := unitID(t, "prod/web/app")
			view := func(prefix string) kv.View {
				entries, err := store.List(t.Context(), prefix)
				if err != nil {
					t.Fatal(err)
				}
				return kv.View{Synced: true, Entries: entries}
			}
			round := func(branch gitState) {
				t.Helper()
				l.observer.fleet(view(kv.StatusPrefix))
				l.observer.records(view(kv.DesiredPrefix))
				l.observer.orders(view(kv.ControlPrefix))
				if _, err := l.round(t.Context(), branch); err != nil {
					t.Fatal(err)
				}
			}

			byHand := deployments.Record{Target: pointer("app/1"), Generation: 7, Commit: taken, Drift: deployments.DriftReport}
			put(t, store.Store, kv.DesiredKey(id), string(encode(byHand)))
			put(t, store.Store, kv.ControlKey(id), "retry")
			unvouched, err := l.branch.loadUnsigned(taken)
			if err != nil {
				t.Fatal(err)
			}
			l.acceptor.unvouched = unvouched
			round(gitState{head: taken, bad: &git.BadCommit{Hash: taken, Err: errors.New("the signer is gone")}})
			if own := l.writer.records[id]; own.record.Retry == 0 {
				t.Fatalf("the retry led to %+v", own)
			}

			o.Push(c.files)
			signed := l.branch.readBranch(t.Context(), gitState{})
			for range 2 { // the second round sees the writes of the first
				round(signed)
			}
			var names []string
			for _, e := range l.snapshot.offered {
				names = append(names, strings.TrimPrefix(e.Key, "desired/prod/web/"))
			}
			if got := strings.Join(names, " "); got != c.want {
				t.Errorf("the snapshot has %q, want %q", got, c.want)
			}
		})
	}
}
