package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"kedge/artifact/object"
	"kedge/kv"
	"kedge/sync/git"
	"kedge/sync/mirror"
	"kedge/sync/mirror/inspect"
	"kedge/sync/notify"
)

// noMirrorHasRun reports whether the store answers, and has no state of a mirror. Once a mirror has written its state,
// a repository that is away is an outage, whose end a mirror waits for.
func noMirrorHasRun(ctx context.Context, store kv.Store) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := store.Get(ctx, kv.MirrorKey)
	return errors.Is(err, kv.ErrNotFound)
}

func (a *app) mirrorCommand() *cobra.Command {
	var c mirror.Config
	var snapshot, snapshotKey, signers, notifications string
	command := &cobra.Command{
		Use:   "mirror REPO",
		Short: "Copy a deployments repo to the store: the daemon beside Consul",
		Long: `Reads the deployments repo's branch, checks the whole commit, and writes what differs to
desired/ in the store. Run two or three: one holds the lease and works, the others take over within seconds when it
is gone.

REPO is https://HOST/PATH, ssh://USER@HOST/PATH, USER@HOST:PATH, or the path of a local bare repo, which is watched:
a push to it is seen at once. Others are polled, and asked at once when a webhook calls /hook, of whichever mirror:
one that doesn't hold the lease passes it on to the one that does, through the store. One webhook will do, for a
load balancer or for one of them.

Where kedge.yaml bounds what releases may do (dests, users, commands), and with --signers, it reads the manifest of
each release that a commit names anew, and needs to get those from the storage. One that isn't there yet is looked
for again after some seconds, then less and less often, once a minute in the end, and at once when a webhook comes.

Most flags are variables, too: KEDGE_SSH_KEY is --ssh-key; kedge help settings names all. From the environment
alone: KEDGE_GIT_USER and KEDGE_GIT_TOKEN (or KEDGE_GIT_TOKEN_FILE) for https; GIT_SSL_CAINFO, GIT_SSL_CERT and
GIT_SSL_KEY, files of further authorities and of a client's certificate, as git has them; KEDGE_GITHUB_APP_ID,
KEDGE_GITHUB_APP_INSTALLATION, KEDGE_GITHUB_APP_KEY_FILE and KEDGE_GITHUB_API for a GitHub App, whose tokens the
mirror makes and renews; KEDGE_WEBHOOK_SECRET (or KEDGE_WEBHOOK_SECRET_FILE) for webhooks of GitHub, GitLab (a
signing token, whsec_..., or a secret token), Gitea, Bitbucket and Azure DevOps (as the password of basic
authentication).`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := a.logger()
			if err != nil {
				return err
			}
			if err := checkVariables(os.Environ()); err != nil {
				return usageError{err}
			}
			if a.onConsul() && (c.LeaseTTL < 10*time.Second || c.LeaseTTL > 24*time.Hour) {
				return usagef("--lease-ttl %s: Consul accepts 10s to 24h", c.LeaseTTL)
			}
			if err := checkAddress(c.Listen); err != nil {
				return usagef("--listen %w", err)
			}
			store, err := a.open(log)
			if err != nil {
				return err
			}
			defer store.Close()
			if err := git.CheckLocal(args[0]); err != nil && noMirrorHasRun(cmd.Context(), store) {
				return hintError{err, "nothing was ever mirrored to this store, so the mirror ends instead of waiting for the " +
					"repository.\n" +
					"If this is a first start: check the path for a typo, or make a repository: git init --bare -b " +
					c.Branch + " " + args[0] + "\n" +
					"If Consul has lost its data: mount the repository again. Nodes keep what they run until then."}
			}
			objects := object.New(object.Config{Log: log})
			trust, err := trustSigners(signers, objects, log)
			if err != nil {
				return err
			}
			c.Releases = inspect.Releases{Objects: objects, Trust: trust}
			if c.Snapshot, err = snapshotWriter(snapshot, snapshotKey, objects); err != nil {
				return err
			}
			c.Repo, c.Store, c.Log, c.Version = args[0], store, log, version()
			c.Metrics = prometheus.NewRegistry()
			registerProcess(c.Metrics)
			if notifications != "" {
				conf, err := notify.ReadConfig(notifications)
				if err != nil {
					return usageError{err}
				}
				c.Leading = notify.New(conf, store, c.Metrics, log).Run
			}
			traces, stopTraces, err := startTraces("kedge-mirror", log)
			if err != nil {
				return usageError{err}
			}
			defer stopTraces()
			c.Trace = traces
			m, err := mirror.New(c)
			if err != nil {
				return err
			}
			log.Info("mirror starts", "version", version(), "repo", c.Repo, "branch", c.Branch, "store", store.String())
			defer logWhenDone(cmd.Context(), log, "mirror stops")()
			daemon.SdNotify(false, daemon.SdNotifyReady)
			return m.Run(cmd.Context())
		},
	}
	f := command.Flags()
	f.StringVar(&c.Branch, "branch", envOr("KEDGE_BRANCH", "main"), "branch to mirror")
	pathFlag(f, &c.Path)
	f.DurationVar(&c.Every, "every", 0, "time between polls (default 15s; a local repo: 60s, beside watching it)")
	f.StringVar(
		&c.Accept,
		"accept",
		"",
		"full hash of a `commit` to take, once, whatever its history and the units that it removes: for a repo that was "+
			"replaced",
	)
	f.StringVar(&c.Name, "name", os.Getenv("KEDGE_NODE"), "who holds the lease, for people (default: the host's name)")
	f.DurationVar(&c.LeaseTTL, "lease-ttl", 15*time.Second,
		"how long a lease outlives its renewals; 10s to 24h on Consul")
	f.StringVar(&c.SSHKey, "ssh-key", os.Getenv("KEDGE_SSH_KEY"), "private key `file` for ssh (default: the SSH agent)")
	f.StringVar(&c.KnownHosts, "known-hosts", os.Getenv("KEDGE_KNOWN_HOSTS"),
		"known_hosts `file` for ssh (default ~/.ssh/known_hosts)")
	f.StringVar(&c.SignedBy, "signed-by", os.Getenv("KEDGE_SIGNED_BY"),
		"allowed_signers `file`: with it, a commit without a signature by one of them, or of --signed-by-pgp, is refused")
	f.StringVar(&c.SignedByPGP, "signed-by-pgp", os.Getenv("KEDGE_SIGNED_BY_PGP"),
		"`file` of OpenPGP public keys (gpg --armor --export): with it, a commit without a signature by one of them, or of "+
			"--signed-by, is refused")
	f.StringVar(
		&signers,
		"signers",
		os.Getenv("KEDGE_SIGNERS"),
		"allowed_signers `file` of the agents: with it, a commit waits until its releases are signed by one of them",
	)
	f.StringVar(
		&c.CacheDir,
		"cache-dir",
		os.Getenv("CACHE_DIRECTORY"),
		"`directory` that keeps a remote repo's objects, for a start while Git is away; one mirror each (default: a "+
			"temporary one)",
	)
	f.StringVar(&snapshot, "snapshot", os.Getenv("KEDGE_SNAPSHOT"),
		"`URL` of an object that keeps a copy of the desired state, for nodes that boot while the store is away")
	f.StringVar(&snapshotKey, "snapshot-key", os.Getenv("KEDGE_SNAPSHOT_KEY"),
		"SSH private key `file` that signs the snapshot; --snapshot needs it")
	f.StringVar(&notifications, "notify", os.Getenv("KEDGE_NOTIFY"),
		"`file` that says who is notified of rollouts: kedge help notifications")
	f.StringVar(&c.Listen, "listen", os.Getenv("KEDGE_LISTEN"), "`address` of /hook, /live and /metrics (default: none)")
	return command
}
