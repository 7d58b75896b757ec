package deployments

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// SecretRef says where a node finds a secret's value, as SOURCE:NAME or SOURCE:NAME#FIELD. Neither a manifest nor the
// store contains the value: the node reads it, if its own configuration allows the reference.
type SecretRef string

// The sources of secrets.
const (
	SecretFile       = "file"           // an absolute path on the node
	SecretCredential = "credential"     // a credential that systemd passes to the agent
	SecretSSM        = "ssm"            // a parameter of AWS Systems Manager
	SecretManager    = "secretsmanager" // a secret of AWS Secrets Manager: FIELD of its JSON, or all of it
	SecretVault      = "vault"          // a path of Vault's KV engine, as in its API; FIELD is required
)

var secretSources = []string{SecretFile, SecretCredential, SecretSSM, SecretManager, SecretVault}

// maxSecretRef bounds a reference, in bytes.
const maxSecretRef = 2048

// Parts returns a valid reference's source, name and field; field is empty if there is none.
func (r SecretRef) Parts() (source, name, field string) {
	source, name, _ = strings.Cut(string(r), ":")
	if source == SecretManager || source == SecretVault {
		name, field, _ = strings.Cut(name, "#")
	}
	return source, name, field
}

// ParseSecretRef parses a reference. Its error quotes no text that may be a secret instead.
func ParseSecretRef(s string) (SecretRef, error) {
	r := SecretRef(s)
	source, name, field := r.Parts()
	switch {
	case !slices.Contains(secretSources, source) || !strings.Contains(s, ":"):
		// The error doesn't quote the text, which may be a secret itself.
		return "", errors.New("want SOURCE:NAME, as in ssm:/prod/db; SOURCE is file, credential, ssm, " +
			"secretsmanager or vault")
	case name == "" || len(s) > maxSecretRef || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c == 0x7f }):
		return "", fmt.Errorf("secret %q: want a name after %s: without blanks", clip(s), source)
	case strings.HasSuffix(s, "#"):
		return "", fmt.Errorf("secret %q: no field after #", clip(s))
	}
	if err := checkSecretName(source, name); err != nil {
		return "", fmt.Errorf("secret %q: %w", clip(s), err)
	}
	if source == SecretVault && field == "" {
		return "", fmt.Errorf("secret %q: want a field, as in vault:secret/data/prod/db#password", clip(s))
	}
	return r, nil
}

// checkSecretName returns an error if a name is not valid for its source, or could be read as a name other than the one
// that it shows.
func checkSecretName(source, name string) error {
	switch source {
	case SecretFile:
		if !strings.HasPrefix(name, "/") || path.Clean(name) != name || name == "/" {
			return errors.New("want a clean absolute path, as in file:/etc/kedge/secrets/db")
		}
	case SecretCredential:
		if strings.Contains(name, "/") || name == "." || name == ".." {
			return errors.New("want a credential's name, as in credential:db")
		}
	default:
		if clean := path.Clean("/" + name); clean != "/"+strings.TrimPrefix(name, "/") {
			return errors.New("want a path with no empty part, and no . or .. for a part")
		}
		if strings.ContainsAny(name, "?%") {
			return errors.New("want a name without ? and %")
		}
	}
	return nil
}

// CheckSecretPrefix returns an error unless s is a valid entry of a node's allow-list. An entry is
// a reference, or the first whole path segments of references, as in ssm:/prod/.
func CheckSecretPrefix(s string) error {
	source, name, ok := strings.Cut(s, ":")
	name, _, _ = strings.Cut(name, "#")
	name = strings.TrimSuffix(name, "/")
	if !ok || !slices.Contains(secretSources, source) || name == "" {
		return fmt.Errorf(
			"secrets: %q: want a reference, or its beginning, as in ssm:/prod/ or file:/etc/kedge/secrets/",
			clip(s),
		)
	}
	if err := checkSecretName(source, name); err != nil {
		return fmt.Errorf("secrets: %q: %w", clip(s), err)
	}
	return nil
}

// Within returns the first entry of an allow-list that equals the reference, with or without its field, or is its
// first whole path segments. ok reports whether there is one.
func (r SecretRef) Within(allowed []string) (entry string, ok bool) {
	for _, a := range allowed {
		rest, begins := strings.CutPrefix(string(r), a)
		if begins && (rest == "" || strings.HasSuffix(a, "/") || rest[0] == '/' || rest[0] == '#') {
			return a, true
		}
	}
	return "", false
}
