# Exports the variables NAME... that are not set from FILE (lines NAME=value, mode 0600).
matpo_read_secrets() {
    local file=$1 name line
    shift
    for name in "$@"; do
        [[ -z "${!name:-}" ]] || continue
        if [[ -n "$file" && -e "$file" ]]; then
            case $(stat -L -c %a "$file") in
                600 | 400) ;;
                *)
                    echo "matpo: $file holds secrets and others can read it: chmod 600 $file"
                    exit 2
                    ;;
            esac
            while IFS= read -r line || [[ -n "$line" ]]; do
                [[ "$line" != "$name="* ]] || export "$name=${line#*=}"
            done <"$file"
        fi
        if [[ -z "${!name:-}" ]]; then
            echo "matpo: $name is not set, neither where the job was submitted nor in secret_file=$file"
            exit 2
        fi
    done
}
