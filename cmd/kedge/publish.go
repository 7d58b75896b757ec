package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"kedge/artifact"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/safetext"
)

func (a *app) publishCommand() *cobra.Command {
	var opt artifact.PublishOptions
	var template, name, version, dest, key, created, compression string
	var since []string
	var unconditional bool
	c := &cobra.Command{
		Use:   "publish DIR",
		Short: "Put a release into storage, and print its pointer",
		Long: `Packs DIR, uploads archive, index, deltas, manifest and signature below TO/NAME/VERSION/, and prints the pointer
that goes into the deployments repo. The same tree gives the same bytes, whoever packs it; nothing is ever overwritten with
other bytes, so it can be run again after a cut.

What the release does when it goes live (commands, health, drain, owner …) comes from a manifest's file; name, version and dest
may be given there or here.

  kedge publish ./dist --to s3://acme-releases --name web --version 1.4.2 --dest /srv/web --manifest kedge-manifest.yaml

With --sign the manifest says when it was made (created): agents with signers refuse a release that was made before
their version floor. Published again, a version keeps the time that it has.

For nodes that run one of the last releases it makes deltas: the last three below TO/NAME/, or as many as --deltas says. That takes
the right to list there (s3:ListBucket); without it, and for gs:// (which kedge doesn't list), name them: --since POINTER, once for each. A delta
that would be larger than the parts of the archive that changed is dropped. What the release costs the nodes is printed.

--compression trades time here for bytes that every node fetches. The default is no larger than one stream of zstd -3. Of
source code best makes 7 % less, and takes several times as long; fast makes 7 % more. A version that was published stays
as it is: another level takes another version.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			opt.Dir = args[0]
			if opt.To == "" {
				return usagef("--to is missing: the URL prefix to publish below, as in s3://acme-releases")
			}
			if template != "" {
				if err := readTemplate(template, &opt); err != nil {
					return err
				}
			}
			m := &opt.Manifest
			for _, f := range []struct {
				name, value string
				field       *string
			}{{"name", name, &m.Name}, {"version", version, &m.Version}, {"dest", dest, &m.Dest}} {
				if err := flagMistake(f.name, f.value); err != nil {
					return err
				}
				switch {
				case f.value == "":
				case *f.field != "" && *f.field != f.value:
					return usagef("--%s %s: %s sets another %[1]s: give it in one place", f.name, f.value, template)
				default:
					*f.field = f.value
				}
			}
			if m.Name == "" || m.Version == "" || m.Dest == "" && opt.Template == nil {
				return usagef("name, version and dest are needed: give --name, --version and --dest, or set them in --manifest")
			}
			if m.Strategy == "" {
				m.Strategy = deployments.StrategyRelease
			}
			if err := deployments.CheckURL(strings.TrimSuffix(opt.To, "/") + "/x"); err != nil {
				return usagef("--to %q: %w, as in s3://BUCKET/PREFIX or file:///DIR", deployments.ShownURL(opt.To), err)
			}
			for _, s := range since {
				p, err := deployments.ParsePointer(s)
				if err != nil {
					return usagef("--since: %w", err)
				}
				opt.Since = append(opt.Since, p)
			}
			var err error
			if err := opt.Compression.Parse(compression); err != nil {
				return usagef("--compression %w", err)
			}
			if opt.Find < 0 {
				return usagef("--deltas %d: want 0 or more", opt.Find)
			}
			log, err := a.logger()
			if err != nil {
				return err
			}
			if key != "" {
				if opt.Sign, opt.CheckSignature, err = manifestSigner(key); err != nil {
					return err
				}
				if m.Created, err = createdAt(created, time.Now()); err != nil {
					return err
				}
			}
			start := time.Now()
			progress := a.progressLine()
			opt.Progress, opt.Log = progress.show, slog.New(progress.clearingHandler(log.Handler()))
			published, err := artifact.Publish(ctx,
				object.New(object.Config{UnconditionalPut: unconditional, Log: opt.Log}), opt)
			progress.clear()
			if errors.Is(err, object.ErrUnavailable) {
				hint := "run kedge publish again when the storage answers: what was uploaded already is not uploaded " +
					"again" + endpointHint(opt.To)
				if errors.Is(err, object.ErrCredentials) {
					hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
				}
				err = hintError{err, hint}
			}
			if err != nil {
				return err
			}
			if a.json {
				published.Deltas = append([]artifact.PublishedDelta{}, published.Deltas...)
				return a.printJSON(published)
			}
			for _, line := range publishedLines(m, published, time.Since(start)) {
				fmt.Fprintln(a.stderr, line)
			}
			fmt.Fprintln(a.stdout, published.Pointer)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&opt.To, "to", os.Getenv("KEDGE_PUBLISH_TO"), "`URL` prefix to publish below; also KEDGE_PUBLISH_TO")
	f.StringVar(&template, "manifest", "",
		"`file` with the manifest's fields; --name, --version and --dest give what it lacks")
	f.StringVar(&name, "name", "", "the release's name")
	f.StringVar(&version, "version", "", "the release's version")
	f.StringVar(&dest, "dest", "", "absolute `path` where it goes live")
	f.IntVar(&opt.Find, "deltas", 3, "`how many` of the releases that were published last get a delta; 0: none")
	f.StringArrayVar(&since, "since", nil,
		"`pointer` of an earlier release to make a delta from, in place of those published last; may be repeated")
	f.StringVar(&compression, "compression", opt.Compression.String(),
		"`level` of the archive: fastest, fast, default, best, or one of zstd's numbers, 1 to 22")
	f.StringVar(&key, "sign", "", "SSH private key `file` to sign the manifest with")
	f.StringVar(
		&created,
		"created",
		os.Getenv("SOURCE_DATE_EPOCH"),
		"when a signed release was made: RFC 3339 or seconds since 1970; also SOURCE_DATE_EPOCH (default: now, or when "+
			"this version was published first)",
	)
	f.BoolVar(
		&unconditional,
		"unconditional-put",
		false,
		"for an S3 without If-None-Match: look whether an object is there, which takes the rights to read and "+
			"list, then write it; only one process may publish at a time",
	)
	a.jsonFlag(c, "what was made")
	return c
}

// endpointHint returns the end of a hint, which names the S3 endpoint that the environment sets. It returns "" if the
// environment sets none, or if to is no s3:// URL.
func endpointHint(to string) string {
	for _, name := range []string{"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} {
		if endpoint := os.Getenv(name); endpoint != "" && strings.HasPrefix(to, "s3://") {
			return "; " + name + " names " + safetext.URLs(endpoint)
		}
	}
	return ""
}

// flagMistake returns an error if a flag's value is invalid for the manifest's field of that name. An empty value is
// valid: the flag was not given.
func flagMistake(name, value string) error {
	if value == "" {
		return nil
	}
	_, err := deployments.ParseTemplate(fmt.Appendf(nil, "%s: %q\n", name, value), "file:///manifest.yaml")
	if wrong := deployments.Problems(nil); errors.As(err, &wrong) {
		return usagef("--%s: %s", name, strings.TrimPrefix(wrong[0].Message, name+" "))
	}
	return err
}

// publishedLines describes a published release and, if it wasn't published before, what nodes will fetch for it.
func publishedLines(m *deployments.Manifest, p artifact.Published, took time.Duration) []string {
	if p.AlreadyPublished {
		return []string{fmt.Sprintf("%s %s was published before, with the same bytes", m.Name, m.Version)}
	}
	lines := []string{
		fmt.Sprintf("published %s %s in %s: %s, %s, as an archive of %s", m.Name, m.Version, took.Round(time.Millisecond),
			count(p.Files, "file"), bytesText(p.Tree), bytesText(p.Archive)),
	}
	for _, d := range p.Deltas {
		from := d.From.Digest.Short()
		if d.Version != "" {
			from = d.Version + " (" + from + ")"
		}
		line := fmt.Sprintf("nodes that run %s fetch %s in %s", from, bytesText(d.Bytes), count(d.Requests, "request"))
		if d.Dropped > 0 {
			line += fmt.Sprintf(", as parts of the archive: a delta would take %s", bytesText(d.Dropped))
		}
		lines = append(lines, line)
	}
	others := "nodes"
	if len(p.Deltas) > 0 {
		others = "nodes that run none of these"
	}
	return append(lines, fmt.Sprintf("%s fetch what changed, at most %s", others, bytesText(p.Archive+p.Index)))
}

// createdAt parses when a release was made, in RFC 3339 or seconds since 1970; empty: now. It returns whole seconds.
func createdAt(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return now.UTC().Truncate(time.Second), nil
	}
	if seconds, err := strconv.ParseInt(s, 10, 64); err == nil {
		return time.Unix(seconds, 0).UTC(), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return time.Time{}, usagef("--created %q: want a time, as in 2026-11-24T09:00:00Z, or seconds since 1970", s)
	}
	return t.UTC().Truncate(time.Second), nil
}

// bytesText formats a size: 734 MB, 0.8 MB, 312 B.
func bytesText(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 100_000:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	case n < 100_000_000:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%d MB", n/1e6)
}

// progressLine shows progress on one line of stderr if that is a terminal, and nothing otherwise.
type progressLine struct {
	a    *app
	mu   sync.Mutex
	last time.Time // when the line was last written; zero: it is empty
}

func (a *app) progressLine() *progressLine { return &progressLine{a: a} }

func (l *progressLine) show(p meter.Progress) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if terminalWidth(l.a.stderr) == 0 || time.Since(l.last) < 50*time.Millisecond {
		return
	}
	l.last = time.Now()
	if p.Total > 0 {
		fmt.Fprintf(l.a.stderr, "\r\x1b[K%s %3d%% of %s", p.Phase, 100*p.Done/p.Total, bytesText(p.Total))
		return
	}
	fmt.Fprintf(l.a.stderr, "\r\x1b[K%s %s", p.Phase, bytesText(p.Done))
}

func (l *progressLine) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.last.IsZero() {
		fmt.Fprint(l.a.stderr, "\r\x1b[K")
		l.last = time.Time{}
	}
}

// clearingHandler returns a log handler that clears the progress line before it writes.
func (l *progressLine) clearingHandler(log slog.Handler) slog.Handler { return clearing{log, l} }

type clearing struct {
	slog.Handler
	line *progressLine
}

func (c clearing) Handle(ctx context.Context, r slog.Record) error {
	c.line.clear()
	return c.Handler.Handle(ctx, r)
}
