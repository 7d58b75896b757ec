package notify

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"kedge/deployments"
	"kedge/deployments/inputfile"
)

// Config is the content of kedge mirror's --notify file: who is notified of what.
type Config struct {
	Receivers []Receiver     `yaml:"receivers"`
	Statuses  []StatusTarget `yaml:"statuses"`
	// Link is a template for the URL of a unit's page, with {unit} in it, as in
	// https://kedge.acme.example/unit/{unit}; empty: notifications have no link.
	Link string `yaml:"link"`
}

// Receiver is an HTTP endpoint that events are posted to.
type Receiver struct {
	// Name identifies the receiver in logs, metrics and the store, where its cursor is kept.
	Name string `yaml:"name"`
	// URL is the endpoint. URLFile is a file with the URL, if that is a secret. Exactly one of the two is set.
	URL     string `yaml:"url"`
	URLFile string `yaml:"url_file"`
	// SecretFile is a file with the secret that signs messages according to Standard Webhooks; empty: they are unsigned.
	// The secret is in base64, with or without whsec_ before it; text that isn't base64 is the secret itself.
	SecretFile string `yaml:"secret_file"`
	// Format is cloudevents (default), slack or teams.
	Format Format `yaml:"format"`
	// Text is the template of the text for slack and teams. {message}, {kind}, {unit}, {link}, {release}, {commit},
	// {author} and {subject} are replaced, and Slack's markup is escaped. Default: {message} {link}.
	Text string `yaml:"text"`
	// Events are the kinds of events that the receiver gets; empty: all. Units are patterns
	// STAGE/ROLE/UNIT of the units whose events it gets; empty: all. An event "refused" is about no
	// unit, and Units don't hold it back.
	Events []Kind   `yaml:"events"`
	Units  []string `yaml:"units"`
}

// Format is the format of a receiver's messages.
type Format string

const (
	FormatCloudEvents Format = "cloudevents" // CloudEvents 1.0, structured JSON
	FormatSlack       Format = "slack"       // a Slack incoming webhook
	FormatTeams       Format = "teams"       // a Teams workflow's webhook, with an adaptive card
)

// StatusTarget configures commit statuses on the deployments repo.
type StatusTarget struct {
	Name string `yaml:"name"`
	// Provider is github, gitlab or gitea.
	Provider Provider `yaml:"provider"`
	// API is the URL of the server's API: https://HOST/api/v4 for gitlab and https://HOST/api/v1 for gitea.
	// Default for github: https://api.github.com.
	API string `yaml:"api"`
	// Project is the deployments repo as OWNER/NAME.
	Project string `yaml:"project"`
	// TokenFile is a file with a token that may write commit statuses. Units are patterns, as in Receiver.
	TokenFile string   `yaml:"token_file"`
	Units     []string `yaml:"units"`
}

// Provider is a Git server with an API for commit statuses.
type Provider string

const (
	GitHub Provider = "github"
	GitLab Provider = "gitlab"
	Gitea  Provider = "gitea"
)

// maxReceivers bounds the receivers, and the statuses, of a configuration.
const maxReceivers = 20

var receiverName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// ReadConfig reads and checks a configuration file, and sets defaults. An unknown field is an error.
func ReadConfig(file string) (Config, error) {
	var c Config
	data, err := inputfile.Read("--notify", file)
	if err != nil {
		return c, err
	}
	if err := yaml.UnmarshalWithOptions(data, &c, yaml.Strict()); err != nil {
		return c, fmt.Errorf("%s: %s", file, yaml.FormatError(err, false, false))
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

func (c *Config) check() error {
	var errs []error
	names := map[string]bool{}
	checkName := func(what, s string) {
		switch {
		case !receiverName.MatchString(s):
			errs = append(errs, fmt.Errorf("%s %q: want a name of small letters, digits and dashes", what, s))
		case names[s]:
			errs = append(errs, fmt.Errorf("%s %q is given twice", what, s))
		}
		names[s] = true
	}
	checkUnits := func(of string, patterns []string) {
		for _, p := range patterns {
			if _, err := path.Match(p, "a/b/c"); err != nil || strings.Count(p, "/") != 2 {
				errs = append(errs, fmt.Errorf("%s: unit %q: want STAGE/ROLE/UNIT, each a name or *", of, p))
			}
		}
	}
	if len(c.Receivers) > maxReceivers || len(c.Statuses) > maxReceivers {
		errs = append(errs, fmt.Errorf("at most %d receivers and as many statuses are allowed", maxReceivers))
	}
	for i := range c.Receivers {
		r := &c.Receivers[i]
		checkName("receiver", r.Name)
		if (r.URL == "") == (r.URLFile == "") {
			errs = append(errs, fmt.Errorf("receiver %s: want one of url and url_file", r.Name))
		}
		if r.URL != "" {
			if err := checkURL(r.URL); err != nil {
				errs = append(errs, fmt.Errorf("receiver %s: %w", r.Name, err))
			}
		}
		switch r.Format {
		case "":
			r.Format = FormatCloudEvents
		case FormatCloudEvents, FormatSlack, FormatTeams:
		default:
			errs = append(errs, fmt.Errorf("receiver %s: format %q: want cloudevents, slack or teams", r.Name, r.Format))
		}
		for _, kind := range r.Events {
			if !slices.Contains(Kinds(), kind) {
				errs = append(errs, fmt.Errorf("receiver %s: event %q: want one of %s", r.Name, kind, kindList()))
			}
		}
		checkUnits("receiver "+r.Name, r.Units)
	}
	for i := range c.Statuses {
		s := &c.Statuses[i]
		checkName("statuses", s.Name)
		switch {
		case s.Provider == GitHub && s.API == "":
			s.API = "https://api.github.com"
		case s.Provider != GitHub && s.Provider != GitLab && s.Provider != Gitea:
			errs = append(errs, fmt.Errorf("statuses %s: provider %q: want github, gitlab or gitea", s.Name, s.Provider))
		}
		if err := checkURL(s.API); err != nil {
			errs = append(errs, fmt.Errorf("statuses %s: api: %w", s.Name, err))
		}
		if owner, repo, ok := strings.Cut(s.Project, "/"); !ok || owner == "" || repo == "" {
			errs = append(errs, fmt.Errorf("statuses %s: project %q: want OWNER/NAME", s.Name, s.Project))
		}
		if s.TokenFile == "" {
			errs = append(errs, fmt.Errorf("statuses %s: token_file is missing", s.Name))
		}
		checkUnits("statuses "+s.Name, s.Units)
	}
	return errors.Join(errs...)
}

func kindList() string {
	var names []string
	for _, k := range Kinds() {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// checkURL returns an error unless a URL is https, or http to localhost, 127.0.0.1 or ::1. The error doesn't contain
// the URL, which may be a secret.
func checkURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "":
		return errors.New("want a URL as in https://HOST/PATH")
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && slices.Contains([]string{"localhost", "127.0.0.1", "::1"}, u.Hostname()):
		return nil
	}
	return errors.New("want https://; http:// is for this machine alone")
}

// matches reports whether one of the patterns matches a unit. It is true if there are no patterns.
func matches(patterns []string, id deployments.UnitID) bool {
	for _, p := range patterns {
		if ok, err := path.Match(p, id.String()); ok && err == nil {
			return true
		}
	}
	return len(patterns) == 0
}
