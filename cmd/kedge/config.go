package main

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/inputfile"
)

// agentConfig is /etc/kedge/agent.yaml. Each field is also a flag (dashes for underscores) and an environment variable
// (KEDGE_ and capitals; empty: not set). The flag wins over the environment, the environment over the file.
type agentConfig struct {
	Stage    string `yaml:"stage"`
	Roles    words  `yaml:"roles"`
	Node     string `yaml:"node"`
	StateDir string `yaml:"state_dir"`
	Listen   string `yaml:"listen"`
	// ListenStatus is the address that serves /status and /metrics to other machines. Listen serves them only if it is a
	// loopback address.
	ListenStatus string `yaml:"listen_status"`

	Sources words `yaml:"sources"`
	// LocalSources allows releases from this machine and its network link even if Sources does not name them.
	LocalSources bool `yaml:"local_sources"`
	// Mirrors has, by URL prefix, the places from which objects are read before their own place.
	Mirrors mirrorLists `yaml:"mirrors"`

	Dests      words `yaml:"dests"`
	Users      words `yaml:"users"`
	NoCommands bool  `yaml:"no_commands"`
	// Secrets are the references, or beginnings of them, that releases may use here; empty: none.
	Secrets words  `yaml:"secrets"`
	Signers string `yaml:"signers"`
	// AllowOlderPins lets pins go back to releases made before the node's version floor. Only Signers make a floor.
	AllowOlderPins bool `yaml:"allow_older_pins"`
	// AllowEmpty lets a node be ready though its stage and roles have no unit.
	AllowEmpty bool `yaml:"allow_empty"`
	// Observe makes the agent compare and report the units that these patterns match, without changing anything. Adopt
	// makes it take over a tree that equals a unit's first release.
	Observe unitPatterns `yaml:"observe"`
	Adopt   bool         `yaml:"adopt"`

	// Maintenance switches the node's maintenance mode in Consul on while a unit is drained. The token needs
	// node:write.
	Maintenance bool `yaml:"maintenance"`

	// Snapshot is the URL of the mirror's signed snapshot, for a first boot while the store is away.
	Snapshot        string        `yaml:"snapshot"`
	SnapshotSigners string        `yaml:"snapshot_signers"`
	SnapshotMaxAge  time.Duration `yaml:"snapshot_max_age"`

	// EC2 takes the stage and the roles from the instance's tags, each unless it is configured.
	EC2              bool          `yaml:"ec2"`
	LifecycleHook    string        `yaml:"lifecycle_hook"`
	LifecycleTimeout time.Duration `yaml:"lifecycle_timeout"`
	AutoScalingGroup string        `yaml:"autoscaling_group"`

	MaxBandwidth string        `yaml:"max_bandwidth"`
	StartDelay   time.Duration `yaml:"start_delay"`
	VerifyEvery  time.Duration `yaml:"verify_every"`
	Verify       string        `yaml:"verify"`
	ReadyTimeout time.Duration `yaml:"ready_timeout"`
}

// check returns an error for invalid values, with the place that each came from. Some values are only found invalid
// when they are used.
func (c *agentConfig) check(from origins) error {
	var errs []error
	wrong := func(field string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", from.nameOf(field), err))
		}
	}
	if c.Verify != "" && c.Verify != "always" {
		wrong("verify", fmt.Errorf("%q: want always, or leave it out", c.Verify))
	}
	_, err := byteRate(c.MaxBandwidth)
	wrong("max_bandwidth", err)
	wrong("listen", checkAddress(c.Listen))
	wrong("listen_status", checkAddress(c.ListenStatus))
	if c.Stage != "" {
		wrong("stage", deployments.CheckSegment("stage", c.Stage))
	}
	for _, role := range c.Roles {
		wrong("roles", deployments.CheckSegment("role", role))
	}
	if c.Node != "" {
		wrong("node", deployments.CheckSegment("node", c.Node))
	}
	_, err = c.Mirrors.parse()
	wrong("mirrors", err)
	if c.Snapshot != "" && c.SnapshotSigners == "" {
		wrong("snapshot", errSnapshotSigners)
	}
	return errors.Join(errs...)
}

// origins holds where settings came from, by their names in agent.yaml: FILE:LINE:COLUMN and the name, a variable, or a
// flag. A setting that none of these gives is not in the map.
type origins map[string]string

// nameOf returns what to call a setting in a message.
func (o origins) nameOf(field string) string {
	if from, ok := o[field]; ok {
		return from
	}
	return field
}

// checkAddress returns an error unless a text has the form HOST:PORT of an address to listen at, or is empty.
func checkAddress(address string) error {
	if _, _, err := net.SplitHostPort(address); err != nil && address != "" {
		return fmt.Errorf("%q: want an address, as in 127.0.0.1:7070", address)
	}
	return nil
}

// agentDefaults returns the settings before file, environment and flags are read. Durations have
// their defaults here, as a zero duration doesn't mean that none is given: verify_every: 0s means
// never.
func agentDefaults() agentConfig {
	return agentConfig{
		SnapshotMaxAge:   72 * time.Hour,
		LifecycleTimeout: 15 * time.Minute,
		VerifyEvery:      24 * time.Hour,
		ReadyTimeout:     15 * time.Minute,
	}
}

// durationOf parses a duration in YAML. Its error has no position, so configError adds the field's.
func durationOf(d *time.Duration, text []byte) (err error) {
	s := strings.Trim(strings.TrimSpace(string(text)), `"'`)
	if *d, err = time.ParseDuration(s); err != nil || *d < 0 {
		return fmt.Errorf("%q: want a duration of 0 or more, as in 30s or 5m", s)
	}
	return nil
}

// words is a list. In YAML it is a sequence or one text; in flags and the environment it is one text. Commas or blanks
// separate the items of a text.
type words []string

func (w *words) UnmarshalYAML(read func(any) error) error {
	var one string
	if read(&one) == nil {
		*w = splitList(one)
		return nil
	}
	return read((*[]string)(w))
}

// unitPatterns is a list of STAGE/ROLE/UNIT patterns. People may also give true for all units, or false for none.
type unitPatterns []string

func (u *unitPatterns) UnmarshalYAML(read func(any) error) error {
	var all bool
	if read(&all) == nil {
		u.set(all)
		return nil
	}
	var text string
	if read(&text) == nil {
		return u.Set(text)
	}
	var typed []string
	if err := read(&typed); err != nil {
		return err
	}
	return u.parse(typed)
}

// Set parses the text of a flag, of an environment variable or of a field in the agent's configuration.
func (u *unitPatterns) Set(text string) error {
	if all, err := strconv.ParseBool(text); err == nil {
		u.set(all)
		return nil
	}
	typed := splitList(text)
	if len(typed) == 0 { // as from an empty variable in a script: nothing would be observed
		return errors.New("observe: names no unit: want STAGE/ROLE/UNIT, each a name or *, or true or false")
	}
	return u.parse(typed)
}

func (u *unitPatterns) set(all bool) {
	if *u = nil; all {
		*u = unitPatterns{"*/*/*"}
	}
}

func (u *unitPatterns) parse(typed []string) error {
	*u = nil
	for _, one := range typed {
		p, err := deployments.ParseUnitPattern(one)
		if err != nil {
			return fmt.Errorf("observe: %w; or want true, for all of this node's units", err)
		}
		*u = append(*u, p)
	}
	return nil
}

const defaultAgentConfig = "/etc/kedge/agent.yaml"

// readAgentConfig reads file, strictly, and puts the place of each setting in it into the map from. If file is "", it
// reads the default file, and returns the defaults if that is missing. A missing file that was named is an error.
func readAgentConfig(file string, from origins) (agentConfig, error) {
	c := agentDefaults()
	name := file
	if name == "" {
		name = defaultAgentConfig
	}
	data, err := inputfile.ReadOnce("--config", name)
	if errors.Is(err, os.ErrNotExist) && file == "" {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	err = decodeAgentConfig(name, data, &c, from)
	return c, err
}

// decodeAgentConfig reads a file's fields one by one, so that it reports all mistakes at once if the YAML is valid.
func decodeAgentConfig(name string, data []byte, c *agentConfig, from origins) error {
	file, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return configError(name, err)
	}
	var errs []error
	seen := map[string]bool{}
	for _, document := range file.Docs {
		var fields []*ast.MappingValueNode
		switch body := document.Body.(type) {
		case *ast.MappingNode:
			fields = body.Values
		case *ast.MappingValueNode:
			fields = []*ast.MappingValueNode{body}
		case nil, *ast.NullNode, *ast.CommentGroupNode:
		default:
			at := body.GetToken().Position
			errs = append(errs, fmt.Errorf("%s:%d:%d: want fields, as in stage: prod", name, at.Line, at.Column))
		}
		for _, field := range fields {
			key := field.Key.GetToken()
			if seen[key.Value] {
				errs = append(
					errs,
					fmt.Errorf("%s:%d:%d: the field %q is given twice", name, key.Position.Line, key.Position.Column, key.Value),
				)
				continue
			}
			seen[key.Value] = true
			from[key.Value] = fmt.Sprintf("%s:%d:%d: %s", name, key.Position.Line, key.Position.Column, key.Value)
			one := ast.Mapping(field.Start, false, field)
			if err := yaml.NodeToValue(one, c, yaml.Strict(), yaml.CustomUnmarshaler(durationOf)); err != nil {
				errs = append(errs, configError(name, err, key.Position))
			}
		}
	}
	return errors.Join(errs...)
}

// agentFields yields the names of agent.yaml's fields.
func agentFields(yield func(string) bool) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[agentConfig]()) {
		if !yield(f.Tag.Get("yaml")) {
			return
		}
	}
}

// otherVariables are the known variables that are no field of agent.yaml, in lower case and without KEDGE_. They are
// those of other flags, and those that have no flag.
var otherVariables = strings.Fields(
	`kv prefix log_format log_level config repo branch path ssh_key known_hosts signed_by
	signed_by_pgp snapshot_key notify git_user git_token git_token_file github_app_id github_app_installation
	github_app_key_file github_api webhook_secret webhook_secret_file http_headers_file publish_to tools`,
)

// commandVariables are the variables that a release's commands get, apart from those that are settings, too. In any
// other process they are a mistake: KEDGE_DEST has no effect, unlike KEDGE_DESTS.
var commandVariables = strings.Fields("release version previous digest name dest unit role step run error commit")

// checkVariables returns an error for unknown variables that begin with KEDGE_, as a mistyped one would have no effect.
// A daemon that a release's command starts may have that command's variables.
func checkVariables(environment []string) error {
	known := slices.Collect(agentFields)
	known = append(known, otherVariables...)
	if slices.ContainsFunc(environment, func(v string) bool { return strings.HasPrefix(v, "KEDGE_RUN=") }) {
		known = append(known, commandVariables...) // a release's command started this process
	}
	var errs []error
	for name, meant := range unknownVariables(environment, known) {
		if meant == "" {
			errs = append(errs, fmt.Errorf("unknown environment variable %s: see kedge help settings", name))
			continue
		}
		errs = append(errs, fmt.Errorf("unknown environment variable %s: did you mean %s?", name, meant))
	}
	return errors.Join(errs...)
}

// warnOfVariables warns of unknown variables whose names are nearly those of known ones. It warns of no others: unlike
// a daemon, a person or a script runs commands in an environment with variables of its own.
func (a *app) warnOfVariables(environment []string) {
	known := slices.Concat(slices.Collect(agentFields), otherVariables, commandVariables)
	for name, meant := range unknownVariables(environment, known) {
		if meant != "" {
			a.printMessage("kedge: warning: %s has no effect: did you mean %s?", name, meant)
		}
	}
}

// unknownVariables yields the variables that begin with KEDGE_, but not with KEDGE_TEST_, and aren't known. meant is
// the known variable with a similar name, or "".
func unknownVariables(environment, known []string) iter.Seq2[string, string] {
	return func(yield func(name, meant string) bool) {
		for _, variable := range environment {
			name, _, _ := strings.Cut(variable, "=")
			field, ours := strings.CutPrefix(name, "KEDGE_")
			field = strings.ToLower(field)
			if !ours || slices.Contains(known, field) || strings.HasPrefix(field, "test_") {
				continue
			}
			meant := deployments.Nearest(field, slices.Values(known))
			if meant != "" {
				meant = "KEDGE_" + strings.ToUpper(meant)
			}
			if !yield(name, meant) {
				return
			}
		}
	}
}

// quoteHint says how to write texts that YAML reads as something else.
const quoteHint = `: put texts that contain a colon or a bracket in quotes, as in ["http://host:8080/"]`

// configError adds to err its place in a file, as FILE:LINE:COLUMN, and says of some errors what to write instead. If
// err has no place, it adds that of field or, without field, the file alone.
func configError(file string, err error, field ...*token.Position) error {
	var at yaml.Error
	if !errors.As(err, &at) || at.GetToken() == nil || at.GetToken().Position == nil {
		for _, p := range field {
			return fmt.Errorf("%s:%d:%d: %w", file, p.Line, p.Column, err)
		}
		return fmt.Errorf("%s: %w", file, err)
	}
	found, says := at.GetToken(), at.GetMessage()
	wrong := new(yaml.TypeError)
	switch {
	case errors.As(err, new(*yaml.SyntaxError)) && strings.HasSuffix(says, "must be specified"): // a ',' or bracket
		says += quoteHint
	case !errors.As(err, &wrong):
	case wrong.DstType.Kind() == reflect.Bool:
		says = fmt.Sprintf("%q: want true or false", found.Value)
	case wrong.DstType.Kind() == reflect.String && wrong.SrcType != nil && wrong.SrcType.Kind() == reflect.Map:
		// If a list stands within a mapping in braces, the parser takes a URL's colon for that of a field.
		says = "want a text here, not fields" + quoteHint
	}
	if errors.As(err, new(*yaml.UnknownFieldError)) {
		if near := deployments.Nearest(found.Value, agentFields); near != "" {
			says += fmt.Sprintf(": did you mean %q?", near)
		}
	}
	return fmt.Errorf("%s:%d:%d: %s", file, found.Position.Line, found.Position.Column, says)
}

// splitList splits a text at commas and blanks.
func splitList(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// mirrorLists are object.Mirrors as a person types them.
type mirrorLists map[string]words

// readMirrors parses a list of PREFIX=MIRROR, in which a prefix may occur several times.
func readMirrors(text string) (mirrorLists, error) {
	m := mirrorLists{}
	for _, one := range splitList(text) {
		prefix, mirror, ok := strings.Cut(one, "=")
		if !ok {
			return nil, fmt.Errorf("mirrors %q: want PREFIX=MIRROR, as in s3://acme-releases/=s3://acme-releases-euw1/", one)
		}
		m[prefix] = append(m[prefix], mirror)
	}
	return m, nil
}

// parse returns the lists as object.Mirrors. It is an error if a text is no URL prefix, or a prefix has no mirror.
func (m mirrorLists) parse() (object.Mirrors, error) {
	out := object.Mirrors{}
	for prefix, urls := range m {
		out[prefix] = urls
	}
	return out, out.Check()
}

// byteRate parses a number of bytes a second: 20000000, 20M, 20MB/s, 20 MiB, 20mb, 20,000. It returns 0, for no bound,
// if s is empty or 0. Any other number below 1 or above 1e15 is an error.
func byteRate(s string) (int64, error) {
	t := strings.ToLower(strings.ReplaceAll(strings.TrimSuffix(strings.TrimSpace(s), "/s"), ",", ""))
	if t == "" || t == "0" {
		return 0, nil
	}
	digits := strings.TrimRight(t, " bikmg")
	units := map[string]float64{
		"": 1, "b": 1, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9,
		"ki": 1 << 10, "kib": 1 << 10, "mi": 1 << 20, "mib": 1 << 20, "gi": 1 << 30, "gib": 1 << 30,
	}
	unit, known := units[strings.TrimSpace(t[len(digits):])]
	n, err := strconv.ParseFloat(digits, 64)
	if bytes := n * unit; err != nil || !known || !(bytes >= 1 && bytes <= 1e15) { // NaN is neither
		return 0, fmt.Errorf("bandwidth %q: want bytes a second, as in 20MB/s", s)
	}
	return int64(n * unit), nil
}
